#include "connection.h"

#include <algorithm>
#include <cstring>

namespace expertfleet::lane {
namespace {

constexpr uint8_t kPayloadTag = 1 << 3 | 2;
constexpr size_t kMostHeadBytes = 6;  // of a payload's tag and length
constexpr size_t kMostRestBytes = 1 << 20;
// To spare in a new block, so that a read that does not fill it says that nothing is left.
constexpr size_t kSpareBytes = 4 << 10;
// Less is not worth a read.
constexpr size_t kLeastRoom = 256;

}  // namespace

MessageReader::Room MessageReader::room() {
  size_t needed = available() + kLeastRoom;
  if (const auto length = next_length(); length && *length <= max_message_bytes_) {
    needed = std::max<size_t>(needed, kLengthBytes + *length);
  } else if (skipped_ && !payload_left_) {
    needed = std::max<size_t>(needed, is_rest_kept_ ? rest_left_ : 0);
  }
  if (!block_ || begin_ + needed > block_.capacity()) {
    BlockRef larger = pool_.take(std::max(needed, usual_bytes_) + kSpareBytes);
    if (available()) std::memcpy(larger.data(), block_.data() + begin_, available());
    end_ -= begin_;
    begin_ = 0;
    block_ = std::move(larger);
  }
  return {block_.data() + end_, block_.capacity() - end_};
}

std::optional<bool> MessageReader::take_magic() {
  const size_t count = std::min(available(), kMagicBytes);
  if (std::memcmp(block_.data() + begin_, kMagic, count) != 0) return false;
  if (count < kMagicBytes) return std::nullopt;
  begin_ += kMagicBytes;
  drop_block();
  return true;
}

std::optional<uint64_t> MessageReader::next_length() const {
  if (skipped_ || available() < kLengthBytes) return std::nullopt;
  return read_length(block_.data() + begin_);
}

bool MessageReader::take(Message* message) {
  if (const auto length = next_length()) {
    if (*length <= max_message_bytes_) {
      if (available() - kLengthBytes < *length) return false;
      const uint8_t* data = block_.data() + begin_ + kLengthBytes;
      *message = {block_, {data, static_cast<size_t>(*length)}, *length};
      begin_ += kLengthBytes + *length;
      usual_bytes_ = std::max<size_t>(kLengthBytes + *length, usual_bytes_ - usual_bytes_ / 8);
      drop_block();
      return true;
    }
    const size_t head = std::min<size_t>(available() - kLengthBytes, kMostHeadBytes);
    if (head < kMostHeadBytes) return false;  // the message has more than that
    begin_ += kLengthBytes;
    skipped_ = *length;
    payload_left_ = skipped_;
    rest_left_ = 0;
    const uint8_t* data = block_.data() + begin_;
    uint64_t payload = 0;
    for (size_t i = 1; i < head && data[0] == kPayloadTag; ++i) {
      payload |= uint64_t{data[i] & 0x7fu} << (7 * (i - 1));
      if (data[i] >= 0x80) continue;
      if (i + 1 + payload <= skipped_) {
        payload_left_ = i + 1 + payload;
        rest_left_ = skipped_ - payload_left_;
      }
      break;
    }
    is_rest_kept_ = rest_left_ <= kMostRestBytes;
  }
  if (!skipped_) return false;
  skip();
  if (payload_left_ || available() < rest_left_) return false;
  *message = {block_, {block_ ? block_.data() + begin_ : nullptr, static_cast<size_t>(rest_left_)},
              skipped_};
  begin_ += rest_left_;
  skipped_ = rest_left_ = 0;
  drop_block();
  return true;
}

// Forgets what is there of a message that is not kept.
void MessageReader::skip() {
  const uint64_t of_payload = std::min<uint64_t>(available(), payload_left_);
  begin_ += of_payload;
  payload_left_ -= of_payload;
  if (!payload_left_ && !is_rest_kept_) {
    const uint64_t of_rest = std::min<uint64_t>(available(), rest_left_);
    begin_ += of_rest;
    rest_left_ -= of_rest;
  }
  drop_block();
}

// Idle connections have no block.
void MessageReader::drop_block() {
  if (begin_ != end_) return;
  block_ = BlockRef();
  begin_ = end_ = 0;
}

}  // namespace expertfleet::lane
