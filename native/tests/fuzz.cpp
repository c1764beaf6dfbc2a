// Saved programs, changed and with a checksum that fits again: each is refused, or runs inside its buffers. For
// sanitizers. Usage: fuzz COUNT SEED FILE... (programs as rarefy_program_save writes them); a line of counts is
// printed.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <random>
#include <string>
#include <unistd.h>
#include <vector>

#include "engine/program.h"
#include "rarefy.h"
#include "rarefy_engine.h"

namespace {

typedef std::vector<uint8_t> Bytes;
constexpr unsigned SECONDS_A_MUTANT = 20;  // an alarm ends the program after so long: sanitizers are slow
constexpr int64_t MOST_FLOATS = 1 << 22;   // of what is run

std::mt19937_64 generator;
size_t below(size_t n) { return static_cast<size_t>(generator() % n); }

template <class T>
void change(Bytes &data) {
    const size_t at = (below(4) ? 64 + below(std::min<size_t>(data.size() - 64, 6000)) : 64 + below(data.size() - 64)) /
                      sizeof(T) * sizeof(T);
    if (at + sizeof(T) > data.size()) return;
    T v;
    std::memcpy(&v, data.data() + at, sizeof v);
    const size_t other = 64 + below(data.size() - 64 - sizeof(T));
    switch (below(9)) {
        case 0: v = 0; break;
        case 1: v = static_cast<T>(-1); break;
        case 2: v = static_cast<T>(~T{0}) >> 1; break;
        case 3: ++v; break;
        case 4: --v; break;
        case 5: v = static_cast<T>(generator()); break;
        case 6: v = static_cast<T>(T{1} << below(8 * sizeof(T))); break;
        case 7: v = static_cast<T>(v ^ T{1} << below(8 * sizeof(T))); break;
        default: std::memcpy(&v, data.data() + other / sizeof(T) * sizeof(T), sizeof v);
    }
    std::memcpy(data.data() + at, &v, sizeof v);
}

void mutate(Bytes &data) {
    for (size_t i = 1 + below(3); i-- > 0;) {
        if (below(40) == 0) data.resize(64 + below(data.size() - 64) / 64 * 64);
        if (data.size() < 192) return;
        switch (below(4)) {
            case 0: change<uint16_t>(data); break;
            case 1: change<uint64_t>(data); break;
            default: change<uint32_t>(data);
        }
    }
    // now and then the header's numbers of lanes, batch and threads
    if (below(20) == 0) {
        const int32_t v[] = {1, 2, 4, 8, 16, 64, 1024, 0x7FFFFFFF};
        std::memcpy(data.data() + 32 + 4 * below(3), &v[below(8)], 4);
    }
}

void seal(Bytes &data) {
    const uint64_t size = data.size();
    std::memcpy(data.data() + 16, &size, sizeof size);
    const uint64_t sum = rarefy::engine::block_sum(data.data(), data.size());
    std::memcpy(data.data() + rarefy::engine::CHECKSUM_AT, &sum, sizeof sum);
}

bool run(const rarefy_program *program) {
    rarefy_program_info info;
    rarefy_program_describe(program, &info);
    if (info.scratch_bytes > MOST_FLOATS * 4) return false;
    const int64_t batch = 1 + static_cast<int64_t>(below(3));
    std::vector<std::unique_ptr<float[]>> held;
    std::vector<rarefy_buffer> ports[2];
    for (int32_t output = 0; output < 2; ++output)
        for (int32_t i = 0, layout, shape[3]; i < (output ? info.outputs : info.inputs); ++i) {
            rarefy_program_port(program, output, i, shape, &layout);
            const int64_t floats = int64_t{shape[0]} * shape[1] * shape[2] * batch;
            if (floats > MOST_FLOATS) return false;
            held.emplace_back(new float[static_cast<size_t>(2 * floats)]());
            ports[output].push_back({held.back().get(), floats});
        }
    rarefy_step_info step;
    int64_t work = 0;
    for (int32_t i = 0; i < info.steps; ++i) {
        rarefy_program_step(program, i, &step);
        work += step.dense_macs;
    }
    if (work > int64_t{1} << 26) return false;
    char error[256];
    const int32_t threads = 1 + static_cast<int32_t>(below(2));
    const bool ran = rarefy_program_run(program, ports[0].data(), info.inputs, ports[1].data(), info.outputs, batch,
                                        threads, nullptr, 0, error, sizeof error) == 0;
    return ran;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    const int64_t count = std::atoll(argv[1]);
    std::vector<Bytes> seeds;
    for (int i = 3; i < argc; ++i) {
        std::ifstream file(argv[i], std::ios::binary);
        seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    }
    std::vector<std::string> isas;
    const rarefy_kernel *table = nullptr;
    for (int64_t i = 0, n = rarefy_kernels(&table); i < n; ++i)
        if (std::string(table[i].name) == "engine" && table[i].supported) isas.push_back(table[i].isa);
    int64_t loaded = 0, ran = 0;
    double longest = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        generator.seed(static_cast<uint64_t>(std::atoll(argv[2])) * 1000003u + static_cast<uint64_t>(i));
        Bytes data = seeds[below(seeds.size())];
        mutate(data);
        if (data.size() < 64) continue;
        seal(data);
        const std::unique_ptr<uint8_t, void (*)(void *)> memory(
            static_cast<uint8_t *>(std::aligned_alloc(64, (data.size() + 63) / 64 * 64)), std::free);
        std::memcpy(memory.get(), data.data(), data.size());
        if (std::getenv("RAREFY_FUZZ_VERBOSE")) std::fprintf(stderr, "mutant %lld\n", static_cast<long long>(i));
        const auto begin = std::chrono::steady_clock::now();
        alarm(SECONDS_A_MUTANT);
        char error[256];
        const std::string &isa = isas[below(isas.size())];
        const std::unique_ptr<rarefy_program, void (*)(rarefy_program *)> program(
            rarefy_program_load(memory.get(), static_cast<int64_t>(data.size()), isa.c_str(), error, sizeof error),
            rarefy_program_free);
        if (program) ++loaded, ran += run(program.get());
        alarm(0);
        longest = std::max(longest, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    std::printf("%lld,%lld,%lld,%.3f\n", static_cast<long long>(count), static_cast<long long>(loaded),
                static_cast<long long>(ran), longest);
    return 0;
}
