// DispatchRequest and DispatchResponse (protos/experts.proto) as bytes, and their framing.
//
// On a lane a message is a little-endian uint32 length and then exactly the protobuf message. Both
// sides begin with kMagic. Fields are written in the order of services/core/wire.py, byte for byte
// the same; any order is read. What is rare (unpacked or repeated fields, unknown ones, numbers
// that protobuf would cut off) is not read here: the interpreter decides about those.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace expertfleet::lane {

constexpr char kMagic[] = "EFLANE1\n";
constexpr size_t kMagicBytes = 8;
constexpr size_t kLengthBytes = 4;
// Of W3C trace context as we write it: version 00.
constexpr size_t kTraceparentBytes = 55;

// DType of the proto file.
enum WireType : uint32_t { kNoDtype = 0, kFloat32 = 1, kFloat16 = 2, kBfloat16 = 3, kInt8 = 4 };
// DispatchStatus of the proto file.
enum Status : uint32_t { kOk = 0, kInvalidFrame = 1, kUnknownExpert = 2, kTooLarge = 3,
                         kDraining = 4, kInternal = 5 };

// Bytes of someone else; an absent field has none.
struct Bytes {
  const uint8_t* data = nullptr;
  size_t size = 0;
};

// A request's fields. `expert_ids` and `rows_per_expert` are packed varints, the other Bytes are
// as the proto file says; none is aligned, and nothing is checked but that each is whole.
struct RequestView {
  Bytes hidden_states;
  uint64_t call_id = 0;
  uint32_t layer = 0;
  uint32_t dtype = kNoDtype;
  uint32_t num_tokens = 0;
  uint32_t hidden_size = 0;
  Bytes expert_ids;
  Bytes rows_per_expert;
  Bytes token_rows;
  Bytes topk_weights;
  bool combine = false;
  Bytes traceparent;
  Bytes scales;
  uint32_t answer_dtype = kNoDtype;
};

struct ResponseView {
  Bytes hidden_states;
  uint64_t call_id = 0;
  uint32_t status = kOk;
  Bytes error;
  uint32_t dtype = kNoDtype;
  uint32_t num_rows = 0;
  uint32_t queue_us = 0;
  uint32_t compute_us = 0;
};

// False: no such message, or one that is not read here. What was read until then stays in `view`.
bool parse_request(Bytes message, RequestView* view);
bool parse_response(Bytes message, ResponseView* view);

// Appends the values of a packed field; false if one does not end or is over 2^32 - 1.
bool parse_packed(Bytes packed, std::vector<uint32_t>* values);

// What a request says besides hidden_states; `num_experts` of expert_ids and rows_per_expert, whose
// sum is the number of token_rows and topk_weights.
struct RequestFields {
  uint64_t call_id = 0;
  uint32_t layer = 0;
  uint32_t dtype = kNoDtype;
  uint32_t num_tokens = 0;
  uint32_t hidden_size = 0;
  const uint32_t* expert_ids = nullptr;
  const uint32_t* rows_per_expert = nullptr;
  size_t num_experts = 0;
  const int32_t* token_rows = nullptr;
  const float* topk_weights = nullptr;
  size_t num_assignments = 0;
  bool combine = false;
  Bytes traceparent;
  const float* scales = nullptr;  // [num_tokens] or null
  uint32_t answer_dtype = kNoDtype;
};

struct ResponseFields {
  uint64_t call_id = 0;
  uint32_t dtype = kNoDtype;
  uint32_t num_rows = 0;
  uint32_t queue_us = 0;
  uint32_t compute_us = 0;
};

// A message lies in memory as
//   length (kLengthBytes) | head (payload_head_bytes) | payload | tail
// so that the payload can be gathered, or computed, in its place.

// Bytes of the tag and length of field 1; `payload_bytes` is not 0.
size_t payload_head_bytes(size_t payload_bytes);

// Enough for the tail.
size_t max_request_tail_bytes(const RequestFields& fields);
constexpr size_t kMaxResponseTailBytes = 64;

// Writes the length and the head so that they end at `payload`, when the tail is as long as said.
// Returns where the message begins on the wire.
uint8_t* write_before_payload(uint8_t* payload, size_t payload_bytes, size_t tail_bytes);

// Write all fields but the payload; return the end.
uint8_t* write_request_tail(uint8_t* out, const RequestFields& fields);
uint8_t* write_response_tail(uint8_t* out, const ResponseFields& fields);

inline uint32_t read_length(const uint8_t* in) {
  return uint32_t{in[0]} | uint32_t{in[1]} << 8 | uint32_t{in[2]} << 16 | uint32_t{in[3]} << 24;
}

inline void write_length(uint8_t* out, uint32_t length) {
  for (int i = 0; i < 4; ++i) out[i] = static_cast<uint8_t>(length >> (8 * i));
}

}  // namespace expertfleet::lane
