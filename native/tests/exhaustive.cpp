// Runs every activation kernel of librarefy on recorded inputs and compares with the recorded answers: all lengths of
// tail, odd alignments, in place, one thread and more. For sanitizers and for CPUs without PyTorch. Usage: exhaustive
// CASES
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "rarefy.h"

namespace {

using Bytes = std::vector<uint8_t>;
typedef void kernel(const void *x, void *y, int64_t n, const void *table, int32_t threads);

struct Case {
    std::string name;
    int64_t width;
    Bytes input, expected, table;
};

int64_t number(std::istream &in) {
    int64_t value = 0;
    in.read(reinterpret_cast<char *>(&value), sizeof value);
    return value;
}

Bytes block(std::istream &in) {
    Bytes bytes(static_cast<size_t>(number(in)));
    in.read(reinterpret_cast<char *>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    return bytes;
}

std::vector<Case> read(const char *path) {
    std::ifstream in(path, std::ios::binary);
    std::vector<Case> cases;
    for (int64_t left = number(in); left > 0; --left) {
        const Bytes name = block(in);
        Case one{std::string(name.begin(), name.end()), number(in), {}, {}, {}};
        one.input = block(in);
        one.expected = block(in);
        one.table = block(in);
        cases.push_back(one);
    }
    if (!in) cases.clear();
    return cases;
}

// The kernel on n values from `begin` on, in memory that ends where the values end, so that a sanitizer sees one step
// beyond.
bool right(kernel *f, const Case &c, const Bytes &table, int64_t begin, int64_t n, bool in_place, int32_t threads) {
    const size_t size = static_cast<size_t>(n * c.width), from = static_cast<size_t>(begin * c.width);
    std::unique_ptr<uint8_t[]> x(new uint8_t[size]), y(new uint8_t[size]);
    if (size) std::memcpy(x.get(), c.input.data() + from, size);
    uint8_t *out = in_place ? x.get() : y.get();
    f(x.get(), out, n, table.data(), threads);
    return size == 0 || std::memcmp(out, c.expected.data() + from, size) == 0;
}

}  // namespace

int main(int argc, char **argv) {
    const std::vector<Case> cases = argc == 2 ? read(argv[1]) : std::vector<Case>();
    if (cases.empty()) {
        std::fprintf(stderr, "usage: exhaustive CASES (a file of recorded cases)\n");
        return 2;
    }
    const rarefy_kernel *table = nullptr;
    const int64_t count = rarefy_kernels(&table);
    int64_t wrong = 0;
    std::map<std::string, int64_t> runs;
    for (int64_t k = 0; k < count; ++k) {
        if (!table[k].supported) continue;
        for (const Case &c : cases) {
            if (c.name != table[k].name) continue;
            kernel *f = reinterpret_cast<kernel *>(table[k].entry);
            const int64_t n = static_cast<int64_t>(c.input.size()) / c.width;
            bool good = right(f, c, c.table, 0, n, false, 1) && right(f, c, c.table, 0, n, true, 1) &&
                        right(f, c, c.table, 0, n, false, 3);
            for (int64_t tail = 0; tail <= 257 && tail <= n / 2; ++tail)
                good = good && right(f, c, c.table, tail % 7 + n / 3, tail, tail % 2, 1);
            runs[table[k].isa] += 1;
            if (!good) {
                std::printf("%s (%s) is wrong\n", table[k].name, table[k].isa);
                ++wrong;
            }
        }
    }
    for (const auto &run : runs) std::printf("%s: %lld cases\n", run.first.c_str(), static_cast<long long>(run.second));
    return wrong != 0 || runs.empty();
}
