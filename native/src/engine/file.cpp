// A program as one block of bytes.
//
// A header of 64 bytes, then sections that each begin at a multiple of 64: numbers as this machine has them (little
// endian), every section with its length before it, in an order that reader and writer share. What follows from the
// rest, where values lie and how tiles are cut, is not in the file but made again, so that nothing in a file can place
// a value outside the memory that is planned for it; what the weights say is checked by check_weights.
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>

#include "engine/program.h"

namespace rarefy::engine {

namespace {

constexpr char MAGIC[8] = {'r', 'a', 'r', 'e', 'f', 'y', 'E', '\n'};
constexpr uint32_t VERSION = 7;

struct Header {
    char magic[8];
    uint32_t version, header_bytes;
    uint64_t bytes, checksum;  // of the whole block; of what follows the header
    int32_t lanes, batch, threads, nodes, values;
    char isa[12];
};
static_assert(sizeof(Header) == 64 && offsetof(Header, checksum) == CHECKSUM_AT, "the header is part of the format");

// Four lanes of 64-bit multiply and rotate: fast, and every changed byte changes it.
uint64_t checksum(const uint8_t *data, size_t size) {
    constexpr uint64_t PRIME = 0x9E3779B185EBCA87u;
    uint64_t lane[4] = {1, 2, 3, 4};
    const auto mix = [](uint64_t h, uint64_t word) {
        h = (h ^ word) * PRIME;
        return h ^ h >> 29;
    };
    size_t i = 0;
    for (; i + 32 <= size; i += 32) {
        uint64_t word[4];
        std::memcpy(word, data + i, sizeof word);
        for (int k = 0; k < 4; ++k) lane[k] = mix(lane[k], word[k]);
    }
    for (; i < size; ++i) lane[0] = mix(lane[0], data[i] + 1u);
    uint64_t h = size;
    for (const uint64_t l : lane) h = mix(h, l);
    return h;
}

class Writer {
 public:
    explicit Writer(uint8_t *out) : out_(out) {}

    void bytes(const void *data, size_t size) {
        align(8);
        const uint64_t length = size;
        raw(&length, sizeof length);
        align(64);
        raw(data, size);
    }
    template <class T>
    void array(const Array<T> &a) {
        bytes(a.data(), static_cast<size_t>(a.bytes()));
    }
    template <class T>
    void vector(const std::vector<T> &a) {
        bytes(a.data(), a.size() * sizeof(T));
    }
    void align(size_t to) {
        static const uint8_t zeros[64] = {};
        raw(zeros, (to - at_ % to) % to);
    }
    size_t size() const { return at_; }

    void raw(const void *data, size_t size) {
        if (out_ && size) std::memcpy(out_ + at_, data, size);
        at_ += size;
    }

 private:
    uint8_t *out_;
    size_t at_ = 0;
};

class Reader {
 public:
    Reader(const uint8_t *data, size_t size) : data_(data), size_(size) {}

    // A section of whole T's, in place; none and not good() where it does not fit.
    template <class T>
    Array<T> array() {
        align(8);
        uint64_t length = 0;
        if (!good_ || size_ - at_ < sizeof length) return none<T>();
        std::memcpy(&length, data_ + at_, sizeof length);
        at_ += sizeof length;
        align(64);
        if (!good_ || length > size_ - at_ || length % sizeof(T)) return none<T>();
        const T *first = reinterpret_cast<const T *>(data_ + at_);
        at_ += length;
        return Array<T>(first, static_cast<int64_t>(length / sizeof(T)));
    }
    template <class T>
    std::vector<T> vector() {
        const Array<T> a = array<T>();
        return std::vector<T>(a.data(), a.data() + a.size());
    }
    bool good() const { return good_; }
    bool ended() {
        align(64);
        return good_ && at_ == size_;
    }

 private:
    template <class T>
    Array<T> none() {
        good_ = false;
        return {};
    }
    void align(size_t to) {
        const size_t skip = (to - at_ % to) % to;
        if (skip > size_ - at_) good_ = false;
        else at_ += skip;
    }
    const uint8_t *data_;
    const size_t size_;
    size_t at_ = sizeof(Header);
    bool good_ = true;
};

// What was counted and measured of a step.
struct Facts {
    Config config;
    int64_t stored, total_weights, nonzeros, macs, dense_macs;
    double tuned_seconds, dense_seconds;
};

void write(const rarefy_program &p, Writer &out) {
    out.vector(p.graph.values);
    out.vector(p.graph.nodes);
    for (size_t i = 0; i < p.steps.size(); ++i) {
        const Step &s = p.steps[i];
        out.bytes(p.graph.names[i].data(), p.graph.names[i].size());
        out.vector(p.graph.operands[i]);
        out.vector(p.graph.numbers[i]);
        const Facts facts = {s.config, s.weights.stored, s.total_weights, s.nonzeros,
                             s.macs,   s.dense_macs,     s.tuned_seconds, s.dense_seconds};
        out.bytes(&facts, sizeof facts);
        out.array(s.bias);
        out.array(s.scale);
        out.array(s.shift);
        out.array(s.constants);
        out.array(s.weights.values);
        out.array(s.weights.offsets);
        out.array(s.weights.groups);
        out.array(s.weights.row_ids);
        out.array(s.weights.chunks);
        out.array(s.weights.starts);
    }
    out.align(64);
}

Header header_of(const rarefy_program &p, size_t bytes) {
    Header h = {};
    std::memcpy(h.magic, MAGIC, sizeof h.magic);
    h.version = VERSION;
    h.header_bytes = sizeof h;
    h.bytes = bytes;
    h.lanes = p.kernels->lanes;
    h.batch = p.batch;
    h.threads = p.threads;
    h.nodes = static_cast<int32_t>(p.graph.nodes.size());
    h.values = static_cast<int32_t>(p.graph.values.size());
    std::memcpy(h.isa, p.isa.data(), std::min(p.isa.size(), sizeof h.isa - 1));
    return h;
}

// A program without weights may take a second to load, one with weights in proportion.
constexpr double FREE_WORK = 1 << 28, WORK_A_BYTE = 64.0;

bool in(int64_t x, int64_t low, int64_t high) { return x >= low && x <= high; }

// Whether a node has the fields of its kind alone: all others are as a builder leaves them.
bool plain(const Node &n) {
    const bool conv = n.kind == Kind::CONV, recurrence = n.kind == Kind::RECURRENCE, pool = n.kind == Kind::POOL,
               binary = n.kind == Kind::BINARY, port = n.kind == Kind::INPUT || n.kind == Kind::OUTPUT,
               gru = n.kind == Kind::GRU, gates = n.kind == Kind::LSTM_CELL || n.kind == Kind::LSTM_HIDDEN || gru,
               tensor = n.kind == Kind::TENSOR;
    Node only = node_of(n.kind, n.x, conv || binary || gates || recurrence ? n.other_operand : -1);
    only.out = n.out;
    if (n.kind == Kind::CONCAT || gru || recurrence || tensor) only.operands = n.operands;
    if (tensor) only.function = n.function;
    only.window.in_h = n.window.in_h, only.window.in_w = n.window.in_w, only.window.out_h = n.window.out_h,
    only.window.out_w = n.window.out_w;
    if (conv || pool) only.window = n.window, only.bottom = n.bottom, only.right = n.right, only.back = n.back;
    if (n.kind == Kind::UPSAMPLE) std::memcpy(only.window.stride, n.window.stride, sizeof only.window.stride);
    if (conv || binary || n.kind == Kind::AFFINE) only.activation = n.activation;
    if (conv || binary || gates || recurrence || n.kind == Kind::AFFINE) only.mode = n.mode;
    if (n.layer()) only.out_channels = n.out_channels, only.storage = n.storage, only.choice = n.choice;
    if (conv) only.groups = n.groups;
    if (recurrence) only.reverse = n.reverse, only.cells = n.cells;
    if (pool) only.average = n.average != 0, only.count_padding = n.count_padding != 0;
    if (binary) only.multiply = n.multiply != 0;
    if (port) only.layout = n.layout;
    static_assert(sizeof(Node) == 39 * sizeof(int32_t), "nodes are integers alone");
    return std::memcmp(&only, &n, sizeof n) == 0;
}

// What a file says of a step besides its node: where it lies in the block.
struct Saved {
    Facts facts;
    Array<float> bias, scale, shift, constants;
    Weights weights;
};

// Whether graph is one that a builder would have made; the shapes in it are compared with what they must be.
std::string check_graph(const Graph &given, const std::vector<Saved> &saved) {
    Graph graph;
    for (size_t i = 0; i < given.nodes.size(); ++i) {
        const Node &n = given.nodes[i];
        const std::string at = "step " + std::to_string(i) + ": ";
        if (!in(static_cast<int32_t>(n.kind), 0, static_cast<int32_t>(Kind::KINDS) - 1))
            return at + "its kind is unknown";
        if (n.operands != static_cast<int32_t>(given.operands[i].size())) return at + "its operands are wrong";
        const size_t next = graph.values.size();
        if (n.kind != Kind::OUTPUT && (n.out != static_cast<int32_t>(next) || next >= given.values.size()))
            return at + "its result is wrong";
        if (n.kind == Kind::OUTPUT && n.out != -1) return at + "its result is wrong";
        if (n.kind == Kind::INPUT || n.kind == Kind::CONCAT ? n.x != -1 : n.x < 0) return at + "its operands are wrong";
        if (!plain(n)) return at + "it says what a step of its kind does not have";
        Shape shape = n.kind == Kind::INPUT ? given.values[next] : Shape{1, 1, 1};
        if (n.kind != Kind::TENSOR && n.mode != RAREFY_KTANH && !given.numbers[i].empty())
            return at + "it says what a step of its kind does not have";
        const std::string wrong =
            infer(graph, n, {given.operands[i], given.numbers[i], saved[i].constants.size()}, &shape);
        if (!wrong.empty()) return at + wrong;
        const Window &w = n.window;
        if (int64_t{w.depth.out} * w.out_h != shape.height || w.out_w != shape.width) return at + "its shape is wrong";
        const Shape x = n.x >= 0 ? graph.values[n.x] : Shape{0, 0, 0};
        if (int64_t{w.depth.in} * w.in_h != x.height || w.in_w != x.width) return at + "its shape is wrong";
        if (n.kind == Kind::OUTPUT) continue;
        if (!(given.values[next] == shape)) return at + "its shape is wrong";
        graph.values.push_back(shape);
    }
    if (graph.values.size() != given.values.size()) return "values do not fit the steps";
    const auto has = [&](Kind kind) {
        return std::any_of(given.nodes.begin(), given.nodes.end(), [=](const Node &n) { return n.kind == kind; });
    };
    return has(Kind::INPUT) && has(Kind::OUTPUT) ? "" : "there is no input or no output";
}

std::string check_config(const rarefy_program &p, const Step &step, int32_t lanes) {
    const Config &c = step.config;
    if (c.reserved[0] || c.reserved[1]) return "its kernel is unknown";
    const Shape x = multiplied(p.graph, step.node);
    if (!in(c.kind, 0, WEIGHT_KINDS - 1) || !in(c.vector, 0, 1)) return "its kernel is unknown";
    if (c.bf16() != (step.node.storage == RAREFY_BF16)) return "its kernel does not fit its weights";
    if (c.vector)
        return step.group == 1 && x.pixels() == 1 && step.node.window.pointwise() && step.node.groups == 1 &&
                       x.channels < 65535
                   ? ""
                   : "its kernel does not fit it";
    const int32_t planes = static_cast<int32_t>(Form::PLANES);
    if (c.form == planes)
        return slides(step, matrix_of(p.graph, step.node)) && !c.sparse() ? "" : "its kernel does not fit it";
    if (c.direct() && (!c.sparse() || !reads_in_place(p, step))) return "its kernel does not fit it";
    if (!in(c.rows, 1, MAX_ROWS) || !in(c.vectors, 1, MAX_VECTORS) || !(c.direct() || in(c.form, 0, planes - 1)) ||
        !in(c.block, 1, x.channels))
        return "its kernel is unknown";
    if (p.kernels->lanes == lanes && !p.kernels->block[c.kind][c.rows][c.vectors]) return "its kernel is unknown";
    return "";
}

// Reads the header; an empty string, or why the block is none of ours.
std::string read_header(const void *data, int64_t size, Header *header) {
    const uint8_t *bytes = static_cast<const uint8_t *>(data);
    if (size < static_cast<int64_t>(sizeof *header)) return "this is no engine file: it is shorter than a header";
    std::memcpy(header, bytes, sizeof *header);
    if (std::memcmp(header->magic, MAGIC, sizeof MAGIC) != 0) return "this is no engine file";
    if (header->version != VERSION || header->header_bytes != sizeof *header)
        return "the file has format version " + std::to_string(header->version) + ", this library reads version " +
               std::to_string(VERSION);
    if (header->bytes != static_cast<uint64_t>(size))
        return "the file should have " + std::to_string(header->bytes) + " bytes and has " + std::to_string(size) +
               ": it was cut";
    if (reinterpret_cast<uintptr_t>(data) % 64) return "the data must begin at a multiple of 64 bytes";
    if (block_sum(bytes, static_cast<size_t>(size)) != header->checksum)
        return "the file was altered: its checksum does not fit";
    return "";
}

// Reads the graph and what is said of its steps; an empty string, or what is wrong with the sections.
std::string read_graph(Reader &in, const Header &header, Graph &graph, std::vector<Saved> &saved) {
    graph.values = in.vector<Shape>();
    graph.nodes = in.vector<Node>();
    const size_t count = graph.nodes.size();
    if (!in.good() || count != static_cast<size_t>(header.nodes) ||
        graph.values.size() != static_cast<size_t>(header.values))
        return "the file's steps do not fit its header";
    if (count > static_cast<size_t>(MOST_STEPS)) return "the file has too many steps";
    int64_t operands = 0, numbers = 0;
    saved.resize(count);
    for (size_t i = 0; i < count; ++i) {
        Saved &step = saved[i];
        const std::vector<char> name = in.vector<char>();
        graph.names.emplace_back(name.begin(), name.end());
        graph.operands.push_back(in.vector<int32_t>());
        operands += static_cast<int64_t>(graph.operands.back().size());
        graph.numbers.push_back(in.vector<int64_t>());
        numbers += static_cast<int64_t>(graph.numbers.back().size());
        const std::vector<Facts> facts = in.vector<Facts>();
        if (!in.good() || facts.size() != 1) return "step " + std::to_string(i) + " is cut";
        step.facts = facts[0];
        step.bias = in.array<float>();
        step.scale = in.array<float>();
        step.shift = in.array<float>();
        step.constants = in.array<float>();
        step.weights.values = in.array<uint8_t>();
        step.weights.offsets = in.array<uint16_t>();
        step.weights.groups = in.array<Group>();
        step.weights.row_ids = in.array<int32_t>();
        step.weights.chunks = in.array<int32_t>();
        step.weights.starts = in.array<int64_t>();
        if (!in.good()) return "step " + std::to_string(i) + " is cut";
    }
    if (!in.ended()) return "there is more in the file than its steps";
    if (numbers > MOST_NUMBERS) return "the file describes its steps by too many numbers";
    return operands > MOST_OPERANDS ? "the file concatenates too many values" : check_graph(graph, saved);
}

// Gives a step what was saved of it; an empty string, or what is wrong with that.
std::string restore(rarefy_program &program, Step &step, Saved &saved, int32_t lanes) {
    step.bias = std::move(saved.bias);
    step.scale = std::move(saved.scale);
    step.shift = std::move(saved.shift);
    step.constants = std::move(saved.constants);
    if (step.node.kind != Kind::TENSOR && step.constants.size()) return "it has constants";
    step.weights = std::move(saved.weights);
    const int64_t channels = program.graph.values[step.node.out >= 0 ? step.node.out : step.node.x].channels;
    const bool affine = step.node.kind == Kind::AFFINE, layer = step.node.layer();
    const int64_t factors = affine ? channels : 0;
    if (step.bias.size() != (layer ? product_of(program.graph, step.node).channels : 0) ||
        step.scale.size() != factors || step.shift.size() != factors)
        return "its bias is wrong";
    if (!layer) return step.weights.bytes() ? "it has weights" : "";
    const Matrix m = matrix_of(program.graph, step.node);
    const int64_t total = int64_t{m.rows} * (m.channels / m.groups) * m.taps;
    const int64_t pixels = program.graph.values[step.node.out].pixels();
    const auto time = [](double seconds) { return seconds >= 0.0 && seconds <= 1e30; };
    const Facts &facts = saved.facts;
    if (facts.total_weights != total || !in(facts.nonzeros, 0, total) || facts.macs != facts.nonzeros * pixels ||
        facts.dense_macs != total * pixels || !time(facts.tuned_seconds) || !time(facts.dense_seconds))
        return "its facts are wrong";
    step.config = facts.config;
    step.weights.stored = facts.stored;
    step.total_weights = facts.total_weights;
    step.nonzeros = facts.nonzeros;
    step.macs = facts.macs;
    step.dense_macs = facts.dense_macs;
    step.tuned_seconds = facts.tuned_seconds;
    step.dense_seconds = facts.dense_seconds;
    const std::string wrong = check_config(program, step, lanes);
    return wrong.empty() ? adopt(program, step, lanes) : wrong;
}

}  // namespace

uint64_t block_sum(const uint8_t *data, size_t size) {
    uint8_t header[sizeof(Header)];
    std::memcpy(header, data, sizeof header);
    std::memset(header + CHECKSUM_AT, 0, sizeof(uint64_t));
    const uint64_t sums[2] = {checksum(header, sizeof header), checksum(data + sizeof header, size - sizeof header)};
    return checksum(reinterpret_cast<const uint8_t *>(sums), sizeof sums);
}

}  // namespace rarefy::engine

using namespace rarefy::engine;

#define RAREFY_API __attribute__((visibility("default")))

extern "C" {

RAREFY_API int64_t rarefy_program_size(const rarefy_program *program) {
    Writer count(nullptr);
    count.raw(nullptr, sizeof(Header));
    write(*program, count);
    return static_cast<int64_t>(count.size());
}

RAREFY_API void rarefy_program_save(const rarefy_program *program, void *out) {
    uint8_t *bytes = static_cast<uint8_t *>(out);
    Writer writer(bytes);
    Header header = {};
    writer.raw(&header, sizeof header);
    write(*program, writer);
    header = header_of(*program, writer.size());
    std::memcpy(bytes, &header, sizeof header);
    header.checksum = block_sum(bytes, writer.size());
    std::memcpy(bytes, &header, sizeof header);
}

RAREFY_API rarefy_program *rarefy_program_load(const void *data, int64_t size, const char *isa, char *error,
                                               int64_t error_size) {
    const auto refuse = [&](const std::string &why) {
        fail(error, error_size, why);
        return nullptr;
    };
    try {
        Header header;
        std::string wrong = read_header(data, size, &header);
        if (!wrong.empty()) return refuse(wrong);
        auto p = std::make_unique<rarefy_program>();
        p->isa = isa ? isa : "";
        p->kernels = static_cast<const Kernels *>(find_kernels("engine", &p->isa));
        if (!p->kernels) return refuse("this CPU or this library has no instruction set " + p->isa + " for the engine");
        p->batch = header.batch;
        p->threads = header.threads;
        if (p->batch < 1 || !in(p->threads, 1, MOST_THREADS) ||
            (header.lanes != 4 && header.lanes != 8 && header.lanes != 16))
            return refuse("the file's header is wrong");
        Reader reader(static_cast<const uint8_t *>(data), static_cast<size_t>(size));
        std::vector<Saved> saved;
        wrong = read_graph(reader, header, p->graph, saved);
        if (!wrong.empty()) return refuse(wrong);

        p->plan = make_plan(p->graph, p->batch, p->threads);
        make_steps(*p);
        for (size_t i = 0; i < saved.size(); ++i) {
            wrong = restore(*p, p->steps[i], saved[i], header.lanes);
            if (!wrong.empty()) return refuse("step " + std::to_string(i) + ": " + wrong);
        }
        // what is planned may be large where much is there to be computed with
        if (preparation(*p) > FREE_WORK + WORK_A_BYTE * static_cast<double>(size))
            return refuse("the file's planes are too large for its weights");
        finish_program(*p);
        if (std::max(p->plan.arena_floats, p->banded.arena_floats) + p->scratch_floats() > MOST_SCRATCH_FLOATS)
            return refuse("the file's program takes more than 4 GiB of memory");
        return p.release();
    } catch (const std::exception &e) {
        return refuse(std::string("there is not enough memory for this program: ") + e.what());
    }
}
}
