// The weights of a vector's layer behind a bitmask; kernels.h says how they lie.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "engine/int8/program.h"

namespace rarefy::int8 {

Weights make_bitmask(const engine::Matrix &m, const std::vector<float> &weight) {
    Weights out;
    out.offsets.resize(static_cast<size_t>(m.rows));
    std::iota(out.offsets.begin(), out.offsets.end(), 0);
    for (int32_t first = 0; first < m.rows; first += MASK_ROWS) {
        out.starts.push_back(static_cast<int64_t>(out.values.size()));
        const int32_t rows = std::min<int32_t>(MASK_ROWS, m.rows - first);
        for (int32_t begin = 0; begin < m.channels; begin += MASK_QUADS * QUAD) {
            const size_t masks = out.values.size();
            out.values.resize(masks + MASK_BYTES);
            for (int32_t quad = 0; quad < MASK_QUADS; ++quad) {
                uint64_t mask = 0;
                for (int32_t bit = 0; bit < rows * QUAD; ++bit) {
                    const int32_t column = begin + quad * QUAD + bit % QUAD;
                    if (column >= m.channels) continue;
                    const float w = weight[static_cast<size_t>(first + bit / QUAD) * m.channels + column];
                    if (w == 0.0f) continue;
                    mask |= uint64_t{1} << bit;
                    out.values.push_back(static_cast<int8_t>(w));
                }
                std::memcpy(out.values.data() + masks + sizeof mask * static_cast<size_t>(quad), &mask, sizeof mask);
            }
        }
    }
    out.starts.push_back(static_cast<int64_t>(out.values.size()));
    out.values.resize(out.values.size() + MASK_BEHIND);
    return out;
}

}  // namespace rarefy::int8
