// The experts of a MoE layer: SwiGLU FFNs of the rows that the gate gave to each, weighted, and
// summed in ascending expert id (services/core/expert_ffn.py has the definition).

#include "moe.h"

#include <algorithm>
#include <vector>

#include "elementwise.h"
#include "panels.h"
#include "scratch.h"

namespace expertfleet {

namespace {

// Rows that are computed at once; bounds the memory that is kept. Fewer reads of the weights would
// hardly help at so many.
constexpr int64_t kMaxRows = 1024;

// Consecutive rows of one expert.
struct Group {
  const Expert* expert;
  int64_t first;
  int64_t count;
};

// Of experts of one format.
struct Batch {
  std::vector<MoeRow> rows;
  std::vector<Group> groups;
};

class Layer {
 public:
  Layer(const Expert& expert, Activation type)
      : kernels_(format_kernels(expert.gate.format, active_isa())),
        elementwise_(elementwise_kernels(active_isa())),
        type_(type),
        hidden_size_(expert.gate.inputs),
        intermediate_size_(expert.gate.outputs) {}

  void forward(const Batch& batch) const {
    static thread_local Scratch inputs, intermediates, prepared_intermediates;
    const auto num_rows = static_cast<int64_t>(batch.rows.size());
    const size_t stride = kernels_.prepared_bytes(1, hidden_size_);
    auto* input = inputs.take<uint8_t>(num_rows * stride);
    parallel_rows(num_rows, stride, [&](int64_t row) {
      kernels_.prepare(batch.rows[row].hidden_states, type_, hidden_size_, input + row * stride);
    });

    const size_t row_bytes = intermediate_size_ * value_bytes(type_);
    auto* intermediate = intermediates.take<uint8_t>(num_rows * row_bytes);
    gate_and_up(batch, input, intermediate);

    const size_t prepared_stride = kernels_.prepared_bytes(1, intermediate_size_);
    auto* prepared = prepared_intermediates.take<uint8_t>(num_rows * prepared_stride);
    parallel_rows(num_rows, prepared_stride, [&](int64_t row) {
      kernels_.prepare(intermediate + row * row_bytes, type_, intermediate_size_,
                       prepared + row * prepared_stride);
    });
    down(batch, prepared);
  }

 private:
  // intermediate [rows, intermediate_size] = silu(gate) * up of all groups.
  void gate_and_up(const Batch& batch, const uint8_t* input, uint8_t* intermediate) const {
    const int64_t panels = num_panels(intermediate_size_);
    const size_t stride = kernels_.prepared_bytes(1, hidden_size_);
    const auto num_groups = static_cast<int64_t>(batch.groups.size());
    parallel_runs(num_groups * panels, [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      float* gate = scratch.take<float>(2 * kTileRows * kPanel);
      float* up = gate + kTileRows * kPanel;
      for (int64_t unit = begin; unit < end; ++unit) {
        const Group& group = batch.groups[unit / panels];
        const int64_t panel = unit % panels, column = panel * kPanel;
        for (int64_t row = 0; row < group.count; row += kTileRows) {
          const int64_t count = std::min(kTileRows, group.count - row);
          const uint8_t* rows = input + (group.first + row) * stride;
          kernels_.multiply(group.expert->gate, panel, rows, count, gate);
          kernels_.multiply(group.expert->up, panel, rows, count, up);
          const int64_t value = (group.first + row) * intermediate_size_ + column;
          const PanelTarget target{intermediate + value * value_bytes(type_), intermediate_size_,
                                   std::min(kPanel, intermediate_size_ - column), type_};
          elementwise_.swiglu(gate, up, count, target);
        }
      }
    });
  }

  // Adds to the outputs. A chunk has its columns to itself and takes the groups in their order.
  void down(const Batch& batch, const uint8_t* prepared) const {
    const size_t stride = kernels_.prepared_bytes(1, intermediate_size_);
    parallel_runs(num_panels(hidden_size_), [&](int64_t begin, int64_t end) {
      static thread_local Scratch scratch;
      float* products = scratch.take<float>(kTileRows * kPanel);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kPanel;
        const int64_t width = std::min(kPanel, hidden_size_ - column);
        for (const Group& group : batch.groups) {
          for (int64_t row = 0; row < group.count; row += kTileRows) {
            const int64_t first = group.first + row, count = std::min(kTileRows, group.count - row);
            kernels_.multiply(group.expert->down, panel, prepared + first * stride, count,
                              products);
            elementwise_.combine(products, &batch.rows[first], count, column, width, type_);
          }
        }
      }
    });
  }

  const FormatKernels& kernels_;
  const ElementwiseKernels& elementwise_;
  const Activation type_;
  const int64_t hidden_size_;
  const int64_t intermediate_size_;
};

bool is_valid(const MoeFrame& frame, const MoePart& part) {
  for (int64_t i = part.start; i < part.start + part.count; ++i) {
    const int64_t token = frame.token_rows ? frame.token_rows[i] : i;
    if (token < 0 || token >= frame.num_tokens) return false;
  }
  return true;
}

MoeRow row_of(const MoeFrame& frame, int64_t assignment, size_t row_bytes) {
  const int64_t token = frame.token_rows ? frame.token_rows[assignment] : assignment;
  const int64_t output = frame.is_combined ? token : assignment;
  return {frame.hidden_states + token * row_bytes, frame.output + output * row_bytes,
          frame.topk_weights ? frame.topk_weights[assignment] : 1.0f, frame.is_combined != 0};
}

}  // namespace

void moe_forward(const MoeFrame* frames, const MoePart* parts, int64_t num_parts,
                 Activation type) {
  static thread_local Batch batch;
  batch.rows.clear();
  batch.groups.clear();
  const auto flush = [&] {
    if (batch.rows.empty()) return;
    Layer(*batch.groups[0].expert, type).forward(batch);
    batch.rows.clear();
    batch.groups.clear();
  };
  for (const MoePart* part = parts; part < parts + num_parts; ++part) {
    const Matrix& gate = part->expert->gate;
    const size_t row_bytes = gate.inputs * value_bytes(type);
    const bool is_of_format =
        batch.groups.empty() || batch.groups[0].expert->gate.format == gate.format;
    if (!is_of_format) flush();
    for (int64_t i = part->start; i < part->start + part->count; ++i) {
      const auto num_rows = static_cast<int64_t>(batch.rows.size());
      if (num_rows == kMaxRows) flush();
      if (batch.groups.empty() || batch.groups.back().expert != part->expert) {
        batch.groups.push_back({part->expert, static_cast<int64_t>(batch.rows.size()), 0});
      }
      ++batch.groups.back().count;
      batch.rows.push_back(row_of(frames[part->frame], i, row_bytes));
    }
  }
  flush();
}

}  // namespace expertfleet

extern "C" {
#pragma GCC visibility push(default)
// The parts in ascending expert id; all experts have the same shapes. Returns 0 and
// computes nothing if a token row is none of its frame's.
int32_t ef_moe_forward(const expertfleet::MoeFrame* frames, const expertfleet::MoePart* parts,
                       int64_t num_parts, int32_t type) {
  using namespace expertfleet;
  for (const MoePart* part = parts; part < parts + num_parts; ++part) {
    if (!is_valid(frames[part->frame], *part)) return 0;
  }
  moe_forward(frames, parts, num_parts, static_cast<Activation>(type));
  return 1;
}

// All experts of a layer as the gate chose: output [num_tokens, hidden_size], zeros at first, from
// hidden_states of that shape, topk_ids below num_experts and topk_weights [num_tokens, top_k].
// Writes how many tokens each expert got, rows_per_expert [num_experts].
void ef_moe_gated(const expertfleet::Expert* const* experts, int64_t num_experts,
                  const uint8_t* hidden_states, int64_t num_tokens, const int64_t* topk_ids,
                  const float* topk_weights, int64_t top_k, uint8_t* output,
                  int64_t* rows_per_expert, int32_t type) {
  using namespace expertfleet;
  const int64_t num_assignments = num_tokens * top_k;
  static thread_local std::vector<int64_t> token_rows, starts;
  static thread_local std::vector<float> weights;
  static thread_local std::vector<MoePart> parts;
  token_rows.resize(num_assignments);
  weights.resize(num_assignments);
  starts.resize(num_experts);
  parts.clear();
  std::fill(rows_per_expert, rows_per_expert + num_experts, 0);
  for (int64_t i = 0; i < num_assignments; ++i) ++rows_per_expert[topk_ids[i]];
  int64_t start = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    const int64_t count = rows_per_expert[expert];
    if (count) parts.push_back({experts[expert], 0, start, count});
    starts[expert] = start;
    start += count;
  }
  for (int64_t i = 0; i < num_assignments; ++i) {
    const int64_t place = starts[topk_ids[i]]++;
    token_rows[place] = i / top_k;
    weights[place] = topk_weights[i];
  }
  const MoeFrame frame{hidden_states, num_tokens, token_rows.data(), weights.data(), output, 1};
  moe_forward(&frame, parts.data(), static_cast<int64_t>(parts.size()),
              static_cast<Activation>(type));
}
#pragma GCC visibility pop
}
