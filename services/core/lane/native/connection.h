// One client of a lane: what was read of its next frame, and the answers it has yet to take.
#pragma once

#include <cstdint>
#include <deque>
#include <optional>

#include "batch.h"
#include "block.h"
#include "frame.h"

namespace expertfleet::lane {

// Reads framed messages out of whatever pieces they come in.
//
// Messages of one block share it; one that a block has no room for moves to a larger one. A
// message over the bound is not kept: of it only what follows its first field is, if that is small.
class MessageReader {
 public:
  MessageReader(BlockPool& pool, size_t max_message_bytes)
      : pool_(pool), max_message_bytes_(max_message_bytes) {}

  struct Room {
    uint8_t* data;
    size_t size;
  };
  struct Message {
    BlockRef block;
    Bytes bytes;
    uint64_t total_bytes;  // more than `bytes` has if it was over the bound
  };

  // Where the next bytes are to be read to; at least one. Throws std::bad_alloc.
  Room room();
  // So many bytes were read to there.
  void commit(size_t num_bytes) { end_ += num_bytes; }

  // The magic of a new connection: true if it stood there, none if it is not there yet.
  std::optional<bool> take_magic();

  // The length of the message that comes next, once it is known.
  std::optional<uint64_t> next_length() const;

  // The next message if it is there whole.
  bool take(Message* message);

  // Whether part of a message is there.
  bool is_amid() const { return begin_ != end_ || skipped_; }

 private:
  void skip();
  size_t available() const { return end_ - begin_; }
  void drop_block();

  BlockPool& pool_;
  const size_t max_message_bytes_;
  BlockRef block_;
  size_t begin_ = 0, end_ = 0;  // of what is read and not taken
  size_t usual_bytes_ = 0;      // of the messages lately
  // A message over the bound: its length, and what of its first field and after is still to come.
  uint64_t skipped_ = 0, payload_left_ = 0, rest_left_ = 0;
  bool is_rest_kept_ = false;
};

struct Connection {
  Connection(int fd, uint64_t id, BlockPool& pool, size_t max_frame_bytes, uint64_t now)
      : fd(fd), id(id), reader(pool, max_frame_bytes), progress_ns(now) {}
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  struct Unsent {
    Answer answer;
    size_t held_bytes;
  };

  int fd;
  const uint64_t id;
  MessageReader reader;
  std::deque<Unsent> unsent;
  size_t in_hand_bytes = 0;    // of frames that are not answered, and of their answers
  size_t receiving_bytes = 0;  // of these, of the frame that is being read
  size_t num_handed = 0;       // frames that the interpreter has yet to answer
  uint64_t progress_ns;        // when something was read last
  uint32_t watched = 0;        // events
  bool is_greeted = false;
  bool is_paused = false;      // no room for more
  bool is_ended = false;       // all is said; what still comes is thrown away
};

}  // namespace expertfleet::lane
