#!/bin/sh
# Icarus Verilog for the tests of rarefy.rtl: tests/rtl_tools.sh VENV
# Nothing where it is there already. As root by apt-get; else Debian's package is unpacked into VENV/icarus, with
# commands in VENV/bin that say where its parts lie. Needs a connection to a Debian mirror, and tries three times.
set -eu
venv=$1
PATH="$venv/bin:$PATH"

works() { command -v iverilog >/dev/null && command -v vvp >/dev/null; }

unpack() {
    incoming=$(mktemp -d)
    trap 'rm -rf "$incoming"' EXIT
    mkdir -p "$incoming/lists/partial" "$incoming/cache/partial"
    apt="apt-get -q -o APT::Sandbox::User=root"
    ( cd "$incoming" &&
      { $apt download iverilog ||
        { apt="$apt -o Dir::State::lists=$incoming/lists -o Dir::Cache=$incoming/cache -o Acquire::Languages=none" &&
          $apt update && $apt download iverilog; }; } ) || return 1
    dpkg-deb -x "$incoming"/iverilog*.deb "$venv/icarus" || return 1
    parts=$(dirname "$(find "$venv/icarus" -name ivlpp)")
    printf '#!/bin/sh\nexec "%s/usr/bin/iverilog" -B "%s" "$@"\n' "$venv/icarus" "$parts" >"$venv/bin/iverilog"
    printf '#!/bin/sh\nexec "%s/usr/bin/vvp" -M "%s" "$@"\n' "$venv/icarus" "$parts" >"$venv/bin/vvp"
    chmod +x "$venv/bin/iverilog" "$venv/bin/vvp"
}

install() {
    if [ "$(id -u)" = 0 ]; then
        apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends iverilog && return
        apt-get -q -o DPkg::Lock::Timeout=120 update && \
            apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends iverilog && return
    fi
    unpack
}

works && exit
command -v apt-get >/dev/null || { echo "the tests of rarefy.rtl need Icarus Verilog (iverilog and vvp) on PATH" >&2; exit 1; }
for attempt in 1 2 3; do
    install >&2 && works && exit
    echo "installing iverilog failed, attempt $attempt of 3" >&2
done
echo "the tests of rarefy.rtl need Icarus Verilog: install Debian's package iverilog" >&2
exit 1
