#include "frame.h"

#include <limits>

namespace expertfleet::lane {
namespace {

constexpr uint64_t kMaxUint32 = std::numeric_limits<uint32_t>::max();
constexpr size_t kMaxVarintBytes = 10;

// Reads the fields of a message one after the other.
class FieldReader {
 public:
  explicit FieldReader(Bytes message) : at_(message.data), end_(message.data + message.size) {}

  bool is_at_end() const { return at_ == end_; }

  bool varint(uint64_t* value) {
    uint64_t result = 0;
    for (int shift = 0; at_ < end_ && shift < 64; shift += 7) {
      const uint8_t byte = *at_++;
      if (shift == 63 && byte > 1) return false;  // protobuf would cut it off
      result |= uint64_t{byte & 0x7fu} << shift;
      if (byte < 0x80) {
        *value = result;
        return true;
      }
    }
    return false;
  }

  bool uint32(uint32_t* value) {
    uint64_t wide;
    if (!varint(&wide) || wide > kMaxUint32) return false;
    *value = static_cast<uint32_t>(wide);
    return true;
  }

  // Enums are int32 on the wire.
  bool enumeration(uint32_t* value) { return uint32(value) && *value <= kMaxUint32 / 2; }

  bool boolean(bool* value) {
    uint64_t wide;
    if (!varint(&wide) || wide > 1) return false;
    *value = wide != 0;
    return true;
  }

  bool bytes(Bytes* value) {
    uint64_t size;
    if (!varint(&size) || size > static_cast<size_t>(end_ - at_)) return false;
    *value = {at_, static_cast<size_t>(size)};
    at_ += size;
    return true;
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
};

// field(number, is_bytes, reader) reads a field's value; false where there is none such. A field
// that comes twice is refused: protobuf would merge the two.
template <class Field>
bool parse_fields(Bytes message, const Field& field) {
  FieldReader reader(message);
  uint32_t seen = 0;
  while (!reader.is_at_end()) {
    uint64_t tag;
    if (!reader.varint(&tag)) return false;
    const uint64_t number = tag >> 3, wire_type = tag & 7;
    if (number == 0 || number > 31 || seen >> number & 1) return false;
    if (wire_type != 0 && wire_type != 2) return false;
    seen |= 1u << number;
    if (!field(static_cast<uint32_t>(number), wire_type == 2, reader)) return false;
  }
  return true;
}

size_t varint_bytes(uint64_t value) {
  size_t count = 1;
  while (value >= 0x80) {
    value >>= 7;
    ++count;
  }
  return count;
}

uint8_t* write_varint(uint8_t* out, uint64_t value) {
  while (value >= 0x80) {
    *out++ = static_cast<uint8_t>(value | 0x80);
    value >>= 7;
  }
  *out++ = static_cast<uint8_t>(value);
  return out;
}

// Nothing for 0, as proto3 has it. All of our fields have tags of one byte.
uint8_t* write_number(uint8_t* out, uint32_t field, uint64_t value) {
  if (!value) return out;
  *out++ = static_cast<uint8_t>(field << 3);
  return write_varint(out, value);
}

uint8_t* write_bytes(uint8_t* out, uint32_t field, const void* data, size_t size) {
  if (!size) return out;
  *out++ = static_cast<uint8_t>(field << 3 | 2);
  out = write_varint(out, size);
  std::memcpy(out, data, size);
  return out + size;
}

uint8_t* write_packed(uint8_t* out, uint32_t field, const uint32_t* values, size_t count) {
  if (!count) return out;
  size_t size = 0;
  for (size_t i = 0; i < count; ++i) size += varint_bytes(values[i]);
  *out++ = static_cast<uint8_t>(field << 3 | 2);
  out = write_varint(out, size);
  for (size_t i = 0; i < count; ++i) out = write_varint(out, values[i]);
  return out;
}

}  // namespace

bool parse_request(Bytes message, RequestView* view) {
  return parse_fields(message, [view](uint32_t number, bool is_bytes, FieldReader& reader) {
    if (is_bytes) {
      switch (number) {
        case 1: return reader.bytes(&view->hidden_states);
        case 7: return reader.bytes(&view->expert_ids);
        case 8: return reader.bytes(&view->rows_per_expert);
        case 9: return reader.bytes(&view->token_rows);
        case 10: return reader.bytes(&view->topk_weights);
        case 12: return reader.bytes(&view->traceparent);
        case 13: return reader.bytes(&view->scales);
        default: return false;
      }
    }
    switch (number) {
      case 2: return reader.varint(&view->call_id);
      case 3: return reader.uint32(&view->layer);
      case 4: return reader.enumeration(&view->dtype);
      case 5: return reader.uint32(&view->num_tokens);
      case 6: return reader.uint32(&view->hidden_size);
      case 11: return reader.boolean(&view->combine);
      case 14: return reader.enumeration(&view->answer_dtype);
      default: return false;
    }
  });
}

bool parse_response(Bytes message, ResponseView* view) {
  return parse_fields(message, [view](uint32_t number, bool is_bytes, FieldReader& reader) {
    if (is_bytes) {
      switch (number) {
        case 1: return reader.bytes(&view->hidden_states);
        case 4: return reader.bytes(&view->error);
        default: return false;
      }
    }
    switch (number) {
      case 2: return reader.varint(&view->call_id);
      case 3: return reader.enumeration(&view->status);
      case 5: return reader.enumeration(&view->dtype);
      case 6: return reader.uint32(&view->num_rows);
      case 7: return reader.uint32(&view->queue_us);
      case 8: return reader.uint32(&view->compute_us);
      default: return false;
    }
  });
}

bool parse_packed(Bytes packed, std::vector<uint32_t>* values) {
  FieldReader reader(packed);
  while (!reader.is_at_end()) {
    uint32_t value;
    if (!reader.uint32(&value)) return false;
    values->push_back(value);
  }
  return true;
}

size_t payload_head_bytes(size_t payload_bytes) { return 1 + varint_bytes(payload_bytes); }

size_t max_request_tail_bytes(const RequestFields& fields) {
  constexpr size_t kNumFields = 14;
  return kNumFields * (1 + kMaxVarintBytes) + 2 * 5 * fields.num_experts +
         8 * fields.num_assignments + fields.traceparent.size +
         (fields.scales ? 4 * size_t{fields.num_tokens} : 0);
}

uint8_t* write_before_payload(uint8_t* payload, size_t payload_bytes, size_t tail_bytes) {
  const size_t head = payload_head_bytes(payload_bytes);
  uint8_t* const start = payload - head - kLengthBytes;
  write_length(start, static_cast<uint32_t>(head + payload_bytes + tail_bytes));
  uint8_t* out = start + kLengthBytes;
  *out++ = 1 << 3 | 2;
  write_varint(out, payload_bytes);
  return start;
}

uint8_t* write_request_tail(uint8_t* out, const RequestFields& fields) {
  out = write_number(out, 2, fields.call_id);
  out = write_number(out, 3, fields.layer);
  out = write_number(out, 4, fields.dtype);
  out = write_number(out, 6, fields.hidden_size);
  out = write_number(out, 5, fields.num_tokens);
  out = write_packed(out, 7, fields.expert_ids, fields.num_experts);
  out = write_packed(out, 8, fields.rows_per_expert, fields.num_experts);
  out = write_bytes(out, 9, fields.token_rows, 4 * fields.num_assignments);
  out = write_bytes(out, 10, fields.topk_weights, 4 * fields.num_assignments);
  out = write_bytes(out, 13, fields.scales, fields.scales ? 4 * size_t{fields.num_tokens} : 0);
  out = write_number(out, 11, fields.combine);
  out = write_bytes(out, 12, fields.traceparent.data, fields.traceparent.size);
  return write_number(out, 14, fields.answer_dtype);
}

uint8_t* write_response_tail(uint8_t* out, const ResponseFields& fields) {
  out = write_number(out, 2, fields.call_id);
  out = write_number(out, 5, fields.dtype);
  out = write_number(out, 6, fields.num_rows);
  out = write_number(out, 7, fields.queue_us);
  return write_number(out, 8, fields.compute_us);
}

}  // namespace expertfleet::lane
