#include "mesh.h"

#include <gloo/common/error.h>
#include <unistd.h>

#include <algorithm>

#include "links.h"

namespace colltensor {
namespace {

constexpr std::chrono::milliseconds kTick{100};
constexpr std::chrono::milliseconds kClosing{5};
constexpr std::chrono::hours kNever{24};  // the ticker ends every wait long before
constexpr int kIdleTicks = 10;            // without a wait for as long, the ticker sleeps until there is one
constexpr std::size_t kAlignment = 64;
constexpr std::uint64_t kSilence = ~std::uint64_t{0};  // the channel on which nothing is ever sent

}  // namespace

Ticker::Ticker() : thread_([this] { run(); }) {}

Ticker::~Ticker() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

void Ticker::watch(Buffer* buffer, Direction direction) {
  bool sleeps = false;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    watched_.emplace_back(buffer, direction);
    idle_ticks_ = 0;
    std::swap(sleeps, asleep_);
  }
  if (sleeps) wake_.notify_one();
}

void Ticker::forget(Buffer* buffer) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto is_it = [buffer](const auto& wait) { return wait.first == buffer; };
  watched_.erase(std::find_if(watched_.begin(), watched_.end(), is_it));
}

void Ticker::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    asleep_ = idle_ticks_ >= kIdleTicks;
    if (asleep_) {
      wake_.wait(lock, [this] { return stop_ || !asleep_; });
    } else {
      wake_.wait_for(lock, kTick, [this] { return stop_; });
    }
    if (watched_.empty()) ++idle_ticks_;
    for (const auto& [buffer, direction] : watched_) {
      if (direction == Direction::kSend) {
        buffer->abortWaitSend();
      } else {
        buffer->abortWaitRecv();
      }
    }
  }
}

Mesh::Mesh(std::shared_ptr<gloo::transport::Device> device, int rank, int size, std::chrono::milliseconds timeout)
    : rank_(rank), size_(size), device_(std::move(device)), sentinels_(static_cast<std::size_t>(size)),
      ticker_(new Ticker) {
  if (const auto tcp = std::dynamic_pointer_cast<gloo::transport::tcp::Device>(device_)) {
    context_ = create_links(tcp, rank, size, timeout);
    return;
  }
  context_ = device_->createContext(rank, size);
  context_->setTimeout(timeout);
  for (int peer = 0; peer < size; ++peer) {
    if (peer != rank) context_->createPair(peer);
  }
}

Mesh::~Mesh() = default;

void Mesh::link(int peer, int fd) {
  const std::lock_guard<std::shared_mutex> turn(turn_);
  if (closing_) {
    ::close(fd);
    throw Closed();
  }
  colltensor::link(*context_->getPair(peer), fd);
  watch(peer);
}

// From now on one tells of the connection's failure that hears of it in any case, see probe().
void Mesh::watch(int peer) {
  auto& sentinel = sentinels_[static_cast<std::size_t>(peer)];
  sentinel = context_->createUnboundBuffer(&never_written_, sizeof never_written_);
  sentinel->recv(peer, kSilence);
}

std::vector<char> Mesh::address(int peer) const {
  return peer == rank_ ? std::vector<char>() : context_->getPair(peer)->address().bytes();
}

void Mesh::connect(const std::vector<std::vector<char>>& addresses, const Check& check) {
  const std::lock_guard<std::shared_mutex> turn(turn_);
  if (closing_) throw Closed();
  std::mutex mutex;
  std::condition_variable ended;
  bool done = false;
  std::atomic<bool> stop{false};
  std::exception_ptr failure;
  // Beside this thread, because Gloo's connect() cannot be interrupted but by closing the pair.
  std::thread dialler([&] {
    try {
      for (int peer = 0; peer < size_ && !stop; ++peer) {
        if (peer == rank_) continue;
        context_->getPair(peer)->connect(addresses[static_cast<std::size_t>(peer)]);
        watch(peer);
      }
    } catch (...) {
      failure = std::current_exception();
    }
    const std::lock_guard<std::mutex> lock(mutex);
    done = true;
    ended.notify_one();
  });
  const auto wait = [&](std::chrono::milliseconds time) {
    std::unique_lock<std::mutex> lock(mutex);
    return ended.wait_for(lock, time, [&] { return done; });
  };
  try {
    while (!wait(kTick)) {
      if (closing_) throw Closed();
      if (check()) throw Stopped();
    }
  } catch (...) {
    stop = true;
    while (!wait(kClosing)) shut();
    dialler.join();
    shut();
    throw;
  }
  dialler.join();
  if (failure) {
    shut();
    std::rethrow_exception(failure);
  }
}

thread_local const Check* Mesh::check_ = nullptr;

void Mesh::run(const Check& check, const std::function<void()>& body, bool beside) {
  std::unique_lock<std::shared_mutex> alone(turn_, std::defer_lock);
  std::shared_lock<std::shared_mutex> shared(turn_, std::defer_lock);
  if (beside) {
    shared.lock();
  } else {
    alone.lock();
  }
  if (closing_) throw Closed();
  check_ = &check;
  try {
    body();
  } catch (...) {
    // The messages are gone with the body's frames, and with them Gloo's access to their memory.
    shut();
    throw;
  }
}

Message Mesh::send(int peer, const void* data, std::size_t nbytes, std::uint64_t channel) {
  if (nbytes == 0) return {};
  Message message(context_->createUnboundBuffer(const_cast<void*>(data), nbytes), Ticker::Direction::kSend, peer);
  message.buffer_->send(peer, channel);
  return message;
}

Message Mesh::receive(int peer, void* data, std::size_t nbytes, std::uint64_t channel) {
  if (nbytes == 0) return {};
  Message message(context_->createUnboundBuffer(data, nbytes), Ticker::Direction::kReceive, peer);
  message.buffer_->recv(peer, channel);
  return message;
}

void Mesh::finish(Message& message) {
  if (message.buffer_ == nullptr) return;
  while (!ended(message)) {
    if (closing_) throw Closed();
    if ((*check_)()) throw Stopped();
    try {
      probe(message.peer_);
    } catch (const gloo::Exception&) {
      // It may have ended meanwhile, and the connection after it, of whose peer nothing more is needed.
      if (!ended_before_the_connection(message)) throw;
      break;
    }
  }
  message.buffer_.reset();
}

// Waits until a message has ended, but for a tick at most.
bool Mesh::ended(Message& message) {
  struct Watched {
    Ticker& ticker;
    Buffer* buffer;
    ~Watched() { ticker.forget(buffer); }
  };
  const Watched watched{*ticker_, message.buffer_.get()};
  ticker_->watch(message.buffer_.get(), message.direction_);
  return message.wait(kNever);
}

// Whether a message has ended whose connection has failed: a wait that expires closes what is open of the others.
bool Mesh::ended_before_the_connection(Message& message) {
  try {
    // Twice, because the first may find what a tick left behind.
    return message.wait(std::chrono::milliseconds(0)) || message.wait(std::chrono::milliseconds(0));
  } catch (const gloo::Exception&) {
    return false;
  }
}

// Throws if the connection has failed. Gloo tells the messages that wait for their turn, and not the one whose bytes it
// was just reading (tcp/pair.cc, signalException): so one waits all the time, and a wait for it that is aborted before it
// begins throws what it was told. Nothing may be sent to find out: a peer that has closed would answer with a reset,
// at which its kernel forgets what it has not sent yet, and that may be the rest of the very message.
void Mesh::probe(int peer) {
  const std::lock_guard<std::mutex> lock(failing_);
  Buffer& sentinel = *sentinels_[static_cast<std::size_t>(peer)];
  sentinel.abortWaitRecv();
  sentinel.waitRecv(kNever);
}

void Mesh::finish(std::vector<Message>& messages) {
  for (Message& message : messages) finish(message);
  messages.clear();
}

char* Mesh::scratch(std::size_t nbytes) {
  if (scratch_nbytes_ < nbytes) {
    scratch_.reset();
    scratch_.reset(new char[nbytes + kAlignment]);
    scratch_nbytes_ = nbytes;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(scratch_.get());
  return scratch_.get() + (kAlignment - address % kAlignment) % kAlignment;
}

void Mesh::close() {
  closing_ = true;
  const std::lock_guard<std::shared_mutex> turn(turn_);
  // Without Pair::close(), which would throw away what the kernel has not sent yet.
  sentinels_.clear();  // they hold the context
  context_.reset();
  device_.reset();
  ticker_.reset();
  scratch_.reset();
}

void Mesh::shut() {
  closing_ = true;
  const std::lock_guard<std::mutex> lock(failing_);
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) context_->getPair(peer)->close();
  }
}

}  // namespace colltensor
