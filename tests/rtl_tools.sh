#!/bin/sh
# What the tests of rarefy.rtl need besides Python packages: tests/rtl_tools.sh VENV
# Icarus Verilog, and the standard cells of OSU 0.18 um; nothing where they are there already. Icarus as root by apt-get;
# else Debian's package is unpacked into VENV/icarus, with commands in VENV/bin that say where its parts lie. The cells are
# always unpacked, into VENV/osu018: installed, their package would bring a whole layout flow with it.
# Needs a connection to a Debian mirror, and tries three times.
set -eu
venv=$1
PATH="$venv/bin:$PATH"
liberty=usr/share/qflow/tech/osu018/osu018_stdcells.lib

simulator() { command -v iverilog >/dev/null && command -v vvp >/dev/null; }
cells() { [ -e "/$liberty" ] || [ -e "$venv/osu018/$liberty" ]; }
works() { simulator && cells; }

# Download a package and unpack it into a folder: with the lists of the system if they know it, else with lists of its own.
fetch() {
    incoming=$(mktemp -d)
    mkdir -p "$incoming/lists/partial" "$incoming/cache/partial"
    apt="apt-get -q -o APT::Sandbox::User=root"
    ( cd "$incoming" &&
      { $apt download "$1" ||
        { apt="$apt -o Dir::State::lists=$incoming/lists -o Dir::Cache=$incoming/cache -o Acquire::Languages=none" &&
          $apt update && $apt download "$1"; }; } ) && dpkg-deb -x "$incoming/$1"_*.deb "$2" && fetched=0 || fetched=1
    rm -rf "$incoming"
    return $fetched
}

unpack_simulator() {
    fetch iverilog "$venv/icarus" || return 1
    parts=$(dirname "$(find "$venv/icarus" -name ivlpp)")
    printf '#!/bin/sh\nexec "%s/usr/bin/iverilog" -B "%s" "$@"\n' "$venv/icarus" "$parts" >"$venv/bin/iverilog"
    printf '#!/bin/sh\nexec "%s/usr/bin/vvp" -M "%s" "$@"\n' "$venv/icarus" "$parts" >"$venv/bin/vvp"
    chmod +x "$venv/bin/iverilog" "$venv/bin/vvp"
}

install_simulator() {
    if [ "$(id -u)" = 0 ]; then
        apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends iverilog && return
        apt-get -q -o DPkg::Lock::Timeout=120 update && \
            apt-get -q -o DPkg::Lock::Timeout=120 install -y --no-install-recommends iverilog && return
    fi
    unpack_simulator
}

install() {
    simulator || install_simulator || return 1
    cells || fetch qflow-tech-osu018 "$venv/osu018"
}

works && exit
command -v apt-get >/dev/null || {
    echo "the tests of rarefy.rtl need Icarus Verilog on PATH, and Debian's qflow-tech-osu018 unpacked in $venv/osu018" >&2
    exit 1
}
for attempt in 1 2 3; do
    install >&2 && works && exit
    echo "installing what the tests of rarefy.rtl need failed, attempt $attempt of 3" >&2
done
echo "the tests of rarefy.rtl need Debian's packages iverilog and qflow-tech-osu018" >&2
exit 1
