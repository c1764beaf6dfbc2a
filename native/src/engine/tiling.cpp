#include "engine/tiling.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <map>
#include <string>
#include <tuple>
#include <unordered_map>

namespace rarefy::engine {

namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

struct Copy {
    int32_t plane, phase_y, column, shift;  // element f is the input for pixel f + shift there (see sources())
    int64_t low, high;                      // offsets of its taps, from the pixel's position
    int64_t start;                          // first float of the copy, in the channel's packed floats
};

// The grid of output pixels: position f is row f / stride, column f % stride. Planes follow one another, those of an
// image and then those of the next.
struct Grid {
    const Window &w;
    int32_t lanes;
    Form form;
    int64_t planes, stride, plane_rows;
    int32_t dy_low = 0, dy_high = 0, dx_low = 0, dx_high = 0;  // kernel positions in units of the convolution's stride

    Grid(const Window &window, int32_t images, int32_t lanes_, Form form_)
        : w(window), lanes(lanes_), form(form_), planes(int64_t{images} * window.depth.out) {
        for (int32_t k = 0; k < w.kernel[0]; ++k) extend(dy_low, dy_high, k, tap_y(k));
        for (int32_t k = 0; k < w.kernel[1]; ++k) extend(dx_low, dx_high, k, tap_x(k));
        plane_rows = w.out_h + (planes > 1 ? dy_high - dy_low : 0);
        if (form == Form::COMPACT) stride = w.out_w;
        else if (form == Form::SINGLE) stride = w.out_w + single_gap();
        else if (w.out_w > lanes / 2) stride = (w.out_w + lanes - 1) / lanes * lanes;
        else
            for (stride = 1; stride < w.out_w;) stride *= 2;
    }

    static void extend(int32_t &low, int32_t &high, int32_t k, int32_t d) {
        low = k ? std::min(low, d) : d;
        high = k ? std::max(high, d) : d;
    }
    int32_t at_y(int32_t k) const { return k * w.dilation[0] - w.top; }
    int32_t at_x(int32_t k) const { return k * w.dilation[1] - w.left; }
    int32_t tap_y(int32_t k) const { return static_cast<int32_t>(floor_div(at_y(k), w.stride[0])); }
    int32_t tap_x(int32_t k) const { return static_cast<int32_t>(floor_div(at_x(k), w.stride[1])); }

    // Columns between the rows of Form::SINGLE; a row's right padding may be the next one's left padding.
    int32_t single_gap() const {
        const bool nothing_beyond = int64_t{w.out_w} * w.stride[1] >= w.in_w;
        return nothing_beyond ? std::max(dx_high, 0) > std::max(-dx_low, 0) ? dx_high : std::max(-dx_low, 0)
                              : dx_high - dx_low;
    }

    // The input pixels of the positions from f on, a vector of them, moved by planes, by dy rows of the phase and by
    // columns, which grow; -1 for padding.
    void sources(int64_t f, const Copy &copy, int32_t *index) const {
        std::fill(index, index + lanes, -1);
        int64_t row = floor_div(f, stride), x = f - row * stride;
        for (int64_t lane = 0; lane < lanes; ++row) {
            const int64_t count = std::min<int64_t>(lanes - lane, stride - x), first = first_of(row, copy);
            // beyond the row's pixels lie, in the forms with whole gaps, lanes that no result reads
            const int64_t inside = form == Form::SINGLE ? count : std::min<int64_t>(count, w.out_w - x);
            if (first >= 0) {
                const int64_t s = w.stride[1], in_x = x * s + copy.column;
                const int64_t begin = in_x < 0 ? (-in_x + s - 1) / s : 0;
                const int64_t end = in_x < w.in_w ? std::min<int64_t>(inside, (w.in_w - in_x + s - 1) / s) : 0;
                for (int64_t i = begin; i < end; ++i) index[lane + i] = static_cast<int32_t>(first + in_x + i * s);
            }
            lane += count;
            x = 0;
        }
    }

    // The same for most vectors of most layers, without a look at every lane: whether they lie in one row, and read
    // pixels that follow one another. Then lane i is pixel *base + i, for i in [*begin, *end).
    bool straight(int64_t f, const Copy &copy, int64_t *base, int64_t *begin, int64_t *end) const {
        const int64_t row = floor_div(f, stride), x = f - row * stride;
        if (w.stride[1] != 1 || x + lanes > stride) return false;
        const int64_t first = first_of(row, copy), in_x = x + copy.column;
        *base = first + in_x;
        *begin = std::max<int64_t>(0, -in_x);
        *end = first < 0 ? 0 : std::min<int64_t>(lanes, w.in_w - in_x);
        if (form != Form::SINGLE) *end = std::min(*end, w.out_w - x);
        return true;
    }

    // The first input pixel of a row, or -1 for padding.
    int64_t first_of(int64_t row, const Copy &copy) const {
        const int64_t from = row - dy_low, plane = planes > 1 ? floor_div(from, plane_rows) : 0;
        const int64_t y = planes > 1 ? from - plane * plane_rows + dy_low : row, in_y = y * w.stride[0] + copy.phase_y;
        if (plane < 0 || plane >= planes || in_y < 0 || in_y >= w.in_h) return -1;
        const Depth &d = w.depth;
        const int64_t image = plane / d.out, in_plane = (plane - image * d.out) * d.stride + copy.plane;
        return in_plane < 0 || in_plane >= d.in ? -1 : ((image * d.in + in_plane) * w.in_h + in_y) * w.in_w;
    }

    int64_t positions() const { return ((planes - 1) * plane_rows + w.out_h) * stride; }

    // The output pixels of the positions from f on, a vector of them; -1 where there is none.
    void results(int64_t f, int64_t *pixel) const {
        int64_t row = f / stride, x = f - row * stride, first = result_of(row);
        for (int32_t lane = 0; lane < lanes; ++lane) {
            pixel[lane] = first < 0 || x >= w.out_w ? -1 : first + x;
            if (++x < stride) continue;
            x = 0;
            first = result_of(++row);
        }
    }

    // The first output pixel of a row, or -1.
    int64_t result_of(int64_t row) const {
        const int64_t plane = row / plane_rows, y = row - plane * plane_rows;
        return plane < planes && y < w.out_h ? (plane * w.out_h + y) * w.out_w : -1;
    }
};

class Classifier {
 public:
    Classifier(const Kernels &kernels, Tiling &tiling) : kernels_(kernels), tiling_(tiling) {}

    // For pixels that follow one another; see Grid::straight().
    Pack pack(int64_t base, int64_t begin, int64_t end) const {
        Pack op = {};
        if (begin >= end) return op;
        op.lanes = static_cast<uint16_t>((1u << end) - (1u << begin));
        op.kind = end - begin == kernels_.lanes ? PACK_FULL : PACK_COPY;
        op.a = static_cast<int32_t>(base);
        return op;
    }

    // For any pixels that grow; see Grid::sources().
    Pack pack(const int32_t *index) {
        const int32_t L = kernels_.lanes;
        Pack op = {};
        int32_t low = -1, high = -1, beyond = -1, base = 0, bent = 0;
        for (int32_t i = 0; i < L; ++i) {
            if (index[i] < 0) continue;
            if (low < 0) low = index[i], base = low - i;
            if (beyond < 0 && index[i] - low >= L) beyond = index[i];
            high = index[i];
            op.lanes = static_cast<uint16_t>(op.lanes | 1u << i);
            bent |= index[i] - i - base;
        }
        if (!op.lanes) return op;
        if (!bent) {
            op.kind = op.lanes == (1u << L) - 1 ? PACK_FULL : PACK_COPY;
            op.a = base;
            return op;
        }
        if (!kernels_.permutes && half(index, op)) return op;
        op.a = low;
        op.b = beyond;
        std::array<int32_t, MAX_LANES> lane = {};
        if (kernels_.permutes && (high - low < L || high - beyond < L)) {
            op.kind = high - low < L ? PACK_ONE : PACK_TWO;
            for (int32_t i = 0; i < L; ++i) {
                if (index[i] < 0) continue;
                const bool second = index[i] - low >= L;
                const int32_t from = index[i] - (second ? beyond : low);
                lane[i] = from + (second ? L : 0);
                uint16_t &load = second ? op.load_b : op.load_a;
                load = static_cast<uint16_t>(load | 1u << from);
            }
        } else {
            op.kind = PACK_GATHER;
            op.b = 0;
            for (int32_t i = 0; i < L; ++i) lane[i] = index[i] < 0 ? 0 : index[i] - low;
        }
        const auto found = tables_.emplace(lane, static_cast<int32_t>(tiling_.tables.size()));
        if (found.second) tiling_.tables.insert(tiling_.tables.end(), lane.begin(), lane.begin() + L);
        op.table = found.first->second;
        return op;
    }

 private:
    // Every second pixel, as columns 2 apart want them: whether these are so, and how they are packed then.
    bool half(const int32_t *index, Pack &op) const {
        const int32_t L = kernels_.lanes;
        int32_t first = 0;
        while (index[first] < 0) ++first;
        const int32_t base = index[first] - 2 * first;
        for (int32_t i = first; i < L; ++i)
            if (index[i] >= 0 && index[i] != base + 2 * i) return false;
        for (int32_t i = 0; i < L; ++i) {
            if (index[i] < 0) continue;
            if (i < L / 2) op.load_a = static_cast<uint16_t>(op.load_a | 1u << 2 * i);
            else op.load_b = static_cast<uint16_t>(op.load_b | 1u << (2 * i - L + 1));
        }
        op.kind = PACK_HALF;
        op.a = base;
        return true;
    }

    const Kernels &kernels_;
    Tiling &tiling_;
    std::map<std::array<int32_t, MAX_LANES>, int32_t> tables_;
};

// The place of `items` in `all`, where they are put if they are not there yet.
template <class T>
int32_t place(const std::vector<T> &items, std::vector<T> &all, std::unordered_map<std::string, int32_t> &known) {
    const std::string key(reinterpret_cast<const char *>(items.data()), items.size() * sizeof(T));
    const auto found = known.emplace(key, static_cast<int32_t>(all.size()));
    if (found.second) all.insert(all.end(), items.begin(), items.end());
    return found.first->second;
}

}  // namespace

namespace {

// Pointwise windows are one long row.
Window flat(Window window, int32_t *images, Form *form) {
    if (!window.pointwise()) return window;
    window.in_w = window.out_w = window.depth.in * window.in_h * window.in_w * *images;
    window.in_h = window.out_h = 1;
    window.depth = {};
    *images = 1;
    *form = Form::COMPACT;
    return window;
}

// The layout of a grid, and the copies it consists of.
struct Copies {
    Layout layout;
    std::vector<Copy> all;
    std::vector<int64_t> vectors;  // of each

    Copies(const Grid &grid, int32_t most) {
        const Window &window = grid.w;
        const int32_t L = grid.lanes;
        layout.lanes = L;
        layout.vectors = most;
        layout.channel_floats = TOO_LARGE;
        if (window.taps() > LARGEST_OFFSET) return;  // each has an offset of its own
        std::map<std::tuple<int32_t, int32_t, int32_t, int32_t>, size_t> known;
        std::vector<size_t> copy_of;
        std::vector<int64_t> offset_of;
        const int32_t across = window.kernel[1], plane_taps = window.kernel[0] * across;
        for (int32_t tap = 0; tap < window.taps(); ++tap) {
            const int32_t ky = tap % plane_taps / across, kx = tap % across;
            // a plane that is a tap away is as far as a channel: it has copies of its own
            const int32_t plane = window.depth.at(tap / plane_taps);
            const int64_t dy = grid.tap_y(ky);
            const int32_t phase_y = static_cast<int32_t>(grid.at_y(ky) - dy * window.stride[0]);
            int32_t column = grid.at_x(kx), shift = 0;
            int64_t offset = dy * grid.stride;
            if (grid.form == Form::SINGLE) {
                const int32_t dx = grid.tap_x(kx), left = std::min(grid.dx_low, 0);
                column = grid.at_x(kx) - dx * window.stride[1] + left * window.stride[1];
                offset += dx - left;
            } else {
                shift = static_cast<int32_t>(offset - floor_div(offset, L) * L);
                offset -= shift;
            }
            const auto found = known.emplace(std::make_tuple(plane, phase_y, column, shift), all.size());
            if (found.second) all.push_back({plane, phase_y, column, shift, offset, offset, 0});
            Copy &copy = all[found.first->second];
            copy.low = std::min(copy.low, offset);
            copy.high = std::max(copy.high, offset);
            copy_of.push_back(found.first->second);
            offset_of.push_back(offset);
        }
        int64_t floats = 0;
        for (Copy &copy : all) {
            copy.start = floats;
            copy.low = floor_div(copy.low, L) * L;
            vectors.push_back(most + (copy.high - copy.low + L - 1) / L);
            floats += vectors.back() * L;
            if (floats > LARGEST_OFFSET) return;
        }
        layout.channel_floats = floats;
        for (size_t k = 0; k < copy_of.size(); ++k) {
            const Copy &copy = all[copy_of[k]];
            layout.taps.push_back(static_cast<uint16_t>(copy.start + offset_of[k] - copy.low));
        }
    }
};

}  // namespace

Layout layout_of(const Window &original, int32_t lanes, int32_t vectors, Form form) {
    int32_t images = 1;
    const Window window = flat(original, &images, &form);
    return Copies(Grid(window, images, lanes, form), vectors).layout;
}

double tiling_work(const Window &original, int32_t images, const Layout &layout, Form form) {
    const Window window = flat(original, &images, &form);
    const Grid grid(window, images, layout.lanes, form);
    return static_cast<double>(grid.positions()) / (layout.vectors * layout.lanes) *
           static_cast<double>(layout.channel_floats);
}

namespace {

// Packs the input of the vectors [from, to) of the grid, every copy of it for `most` vectors; fills in which pixels of
// the input the tile reads, and where its packs count from.
std::vector<Pack> packs_of(const Grid &grid, const Copies &copies, int64_t from, int32_t most, Classifier &classifier,
                           Tile &tile) {
    const int32_t L = grid.lanes;
    tile.first = std::numeric_limits<int32_t>::max();
    const auto reads = [&](int64_t first, int64_t need) {
        tile.first = std::min(tile.first, static_cast<int32_t>(first));
        tile.need = std::max(tile.need, static_cast<int32_t>(need));
    };
    std::vector<Pack> packs;
    for (size_t c = 0; c < copies.all.size(); ++c) {
        const Copy &copy = copies.all[c];
        for (int64_t v = 0; v < copies.vectors[c]; ++v) {
            const int64_t f = from * L + copy.low + copy.shift + v * L;
            const bool wanted = v < copies.vectors[c] - (most - tile.vectors);
            int64_t base = 0, begin = 0, end = 0;
            if (!wanted || grid.straight(f, copy, &base, &begin, &end)) {
                packs.push_back(classifier.pack(base, begin, end));
                if (begin < end) reads(base + begin, base + end);
                continue;
            }
            int32_t index[MAX_LANES];
            grid.sources(f, copy, index);
            for (int32_t lane = 0; lane < L; ++lane)
                if (index[lane] >= 0) reads(index[lane], index[lane] + 1);
            packs.push_back(classifier.pack(index));
        }
    }
    bool some = false;
    for (const Pack &op : packs) {
        if (op.kind == PACK_PADDING) continue;
        tile.source = some ? std::min(tile.source, op.a) : op.a;
        some = true;
    }
    for (Pack &op : packs) {
        if (op.kind == PACK_PADDING) continue;
        op.a -= tile.source;
        op.b = op.kind == PACK_TWO ? op.b - tile.source : 0;
    }
    return packs;
}

// Stores the results of the vectors [from, to) of the grid; fills in where they are, and what the stores have in
// common.
std::vector<Store> stores_of(const Grid &grid, int64_t from, int64_t to, Tile &tile) {
    const int32_t L = grid.lanes;
    std::vector<Store> stores;
    for (int64_t v = from; v < to; ++v) {
        Store store = {};
        int32_t lanes = 0;
        int64_t pixel[MAX_LANES];
        grid.results(v * L, pixel);
        for (int32_t lane = 0; lane < L; ++lane) {
            if (pixel[lane] < 0) continue;
            if (!lanes) store.at = static_cast<int32_t>(pixel[lane]);
            store.lanes = static_cast<uint16_t>(store.lanes | 1u << lane);
            ++lanes;
        }
        store.dense = static_cast<uint16_t>((1u << lanes) - 1);
        if (lanes && !tile.pixels) tile.y = store.at;
        tile.pixels += lanes;
        stores.push_back(store);
    }
    for (Store &store : stores) store.at = store.lanes ? store.at - tile.y : 0;
    tile.shape = STORE_PLAIN;
    for (size_t v = 0; v < stores.size(); ++v) {
        if (stores[v].lanes != stores[v].dense) tile.shape = STORE_ANY;
        const bool whole = stores[v].lanes == (1u << L) - 1 && stores[v].at == static_cast<int32_t>(v) * L;
        if (!whole && tile.shape <= STORE_TAIL)
            tile.shape =
                v + 1 == stores.size() && stores[v].at == static_cast<int32_t>(v) * L ? STORE_TAIL : STORE_PREFIX;
    }
    return stores;
}

}  // namespace

Tiling make_tiling(const Window &original, int32_t images, const Kernels &kernels, int32_t vectors, Form form) {
    const Window window = flat(original, &images, &form);
    const int32_t L = kernels.lanes;
    const Grid grid(window, images, L, form);
    const Copies copies(grid, vectors);
    Tiling tiling;
    static_cast<Layout &>(tiling) = copies.layout;

    const int64_t total = (grid.positions() + L - 1) / L, count = (total + vectors - 1) / vectors;
    Classifier classifier(kernels, tiling);
    std::unordered_map<std::string, int32_t> known_packs, known_stores;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t from = total * i / count, to = total * (i + 1) / count;
        Tile tile = {};
        tile.vectors = static_cast<int32_t>(to - from);
        tile.pack = place(packs_of(grid, copies, from, vectors, classifier, tile), tiling.packs, known_packs);
        tile.store = place(stores_of(grid, from, to, tile), tiling.stores, known_stores);
        tiling.tiles.push_back(tile);
    }
    return tiling;
}

}  // namespace rarefy::engine
