// One rank's Gloo connections to all other ranks of a group. No Python, no tvm-ffi.
#pragma once

#include <gloo/transport/context.h>
#include <gloo/transport/device.h>
#include <gloo/transport/unbound_buffer.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <thread>
#include <vector>

namespace colltensor {

// Asked ten times a second by a thread that waits; true ends the call with Stopped. What it throws ends it as well.
using Check = std::function<bool()>;

struct Stopped : std::exception {
  const char* what() const noexcept override { return "stopped by its caller"; }
};
struct Closed : std::exception {
  const char* what() const noexcept override { return "the connection is closed"; }
};

// How the collectives divide their work; the same on all ranks.
struct Limits {
  std::size_t direct_nbytes = 256 << 10;  // up to this size of all that a rank sends, everyone gets everything
  std::size_t block_nbytes = 1 << 20;     // what is sent and combined at a time
  std::size_t depth = 3;                  // blocks on their way at a time
  // What one rank sends another of a block is not less than this. Measured with 64 MiB and 14 ranks on 2 cores: 700 ms
  // with parts of 73 KiB (1 MiB / 14), 450 to 510 of 146 KiB, 380 to 400 of 293 KiB, 400 to 430 of more.
  std::size_t part_nbytes = 256 << 10;
};

using Buffer = gloo::transport::UnboundBuffer;

// Interrupts those who wait in Gloo ten times a second. An expired wait of Gloo's closes all connections; an aborted
// one can be begun again.
class Ticker {
 public:
  enum class Direction { kSend, kReceive };

  Ticker();
  ~Ticker();
  Ticker(const Ticker&) = delete;
  Ticker& operator=(const Ticker&) = delete;

  void watch(Buffer* buffer, Direction direction);
  void forget(Buffer* buffer);

 private:
  void run();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::pair<Buffer*, Direction>> watched_;  // of each thread that waits
  int idle_ticks_ = 0;
  bool asleep_ = false;
  bool stop_ = false;
  std::thread thread_;
};

class Mesh;

// A message on its way. Once it is destroyed Gloo touches its memory no more.
class Message {
 public:
  Message() = default;
  Message(std::unique_ptr<Buffer> buffer, Ticker::Direction direction, int peer)
      : buffer_(std::move(buffer)), direction_(direction), peer_(peer) {}

 private:
  friend class Mesh;
  bool wait(std::chrono::milliseconds timeout) {
    return direction_ == Ticker::Direction::kSend ? buffer_->waitSend(timeout) : buffer_->waitRecv(timeout);
  }

  std::unique_ptr<Buffer> buffer_;  // null for one of no bytes, which does not travel
  Ticker::Direction direction_ = Ticker::Direction::kSend;
  int peer_ = -1;
};

class Mesh {
 public:
  // Not connected yet. Throws what Gloo throws where the device cannot be used.
  Mesh(std::shared_ptr<gloo::transport::Device> device, int rank, int size, std::chrono::milliseconds timeout);
  ~Mesh();

  int rank() const { return rank_; }
  int size() const { return size_; }
  Limits limits;

  // Over TCP: takes the socket that is connected to `peer`, on failure too. Once for each peer.
  void link(int peer, int fd);

  // Over other transports: where this rank waits for `peer`, for that rank's connect().
  std::vector<char> address(int peer) const;

  // Over other transports: connects to all ranks, whose addresses are those that they have for this rank; empty for this
  // one.
  void connect(const std::vector<std::vector<char>>& addresses, const Check& check);

  // Runs `body`, one call at a time; or those that are `beside` others at the same time, each with messages of its own
  // peer and direction, and no scratch memory. When it throws, the connections are shut before that goes on, and nothing is
  // sent, received or written any more.
  void run(const Check& check, const std::function<void()>& body, bool beside = false);

  // Inside run(): messages between two ranks arrive in the order of posting, for each channel.
  Message send(int peer, const void* data, std::size_t nbytes, std::uint64_t channel = 0);
  Message receive(int peer, void* data, std::size_t nbytes, std::uint64_t channel = 0);
  void finish(Message& message);
  void finish(std::vector<Message>& messages);  // and empties them

  // Inside run(): memory that lasts until the next call, aligned to a cache line.
  char* scratch(std::size_t nbytes);

  // Ends a call in another thread, then closes. What was sent still arrives.
  void close();

 private:
  bool ended(Message& message);
  bool ended_before_the_connection(Message& message);
  void watch(int peer);
  void shut();
  void probe(int peer);

  const int rank_;
  const int size_;
  std::shared_ptr<gloo::transport::Device> device_;
  std::shared_ptr<gloo::transport::Context> context_;
  std::vector<std::unique_ptr<Buffer>> sentinels_;  // of each peer: a message that never comes
  std::unique_ptr<Ticker> ticker_;
  std::unique_ptr<char[]> scratch_;
  std::size_t scratch_nbytes_ = 0;
  std::shared_mutex turn_;
  std::mutex failing_;  // of what threads do one at a time that find a connection broken
  static thread_local const Check* check_;
  char never_written_ = 0;
  std::atomic<bool> closing_{false};
};

}  // namespace colltensor
