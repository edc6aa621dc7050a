#include "mesh.h"

namespace colltensor {
namespace {

constexpr std::chrono::milliseconds kTick{100};
constexpr std::chrono::milliseconds kClosing{5};
constexpr std::chrono::hours kNever{24};  // the ticker ends every wait long before
constexpr int kIdleTicks = 10;            // without a wait for as long, the ticker sleeps until there is one
constexpr std::size_t kAlignment = 64;
constexpr std::uint64_t kProbes = ~std::uint64_t{0};  // the channel on which nothing is ever sent

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
    buffer_ = buffer;
    direction_ = direction;
    idle_ticks_ = 0;
    std::swap(sleeps, asleep_);
  }
  if (sleeps) wake_.notify_one();
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
    if (buffer_ == nullptr) {
      ++idle_ticks_;
    } else if (direction_ == Direction::kSend) {
      buffer_->abortWaitSend();
    } else {
      buffer_->abortWaitRecv();
    }
  }
}

Mesh::Mesh(std::shared_ptr<gloo::transport::Device> device, int rank, int size, std::chrono::milliseconds timeout)
    : rank_(rank), size_(size), device_(std::move(device)), context_(device_->createContext(rank, size)),
      ticker_(new Ticker) {
  context_->setTimeout(timeout);
  for (int peer = 0; peer < size; ++peer) {
    if (peer != rank) context_->createPair(peer);
  }
}

Mesh::~Mesh() = default;

std::vector<char> Mesh::address(int peer) const {
  return peer == rank_ ? std::vector<char>() : context_->getPair(peer)->address().bytes();
}

void Mesh::connect(const std::vector<std::vector<char>>& addresses, const Check& check) {
  const std::lock_guard<std::mutex> turn(turn_);
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
        if (peer != rank_) context_->getPair(peer)->connect(addresses[static_cast<std::size_t>(peer)]);
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

void Mesh::run(const Check& check, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> turn(turn_);
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
  Buffer* const buffer = message.buffer_.get();
  if (buffer == nullptr) return;
  struct Watched {
    Ticker& ticker;
    ~Watched() { ticker.watch(nullptr, Ticker::Direction::kReceive); }
  };
  for (;;) {
    {
      const Watched watched{*ticker_};
      ticker_->watch(buffer, message.direction_);
      const bool sends = message.direction_ == Ticker::Direction::kSend;
      if (sends ? buffer->waitSend(kNever) : buffer->waitRecv(kNever)) break;
    }
    if (closing_) throw Closed();
    if ((*check_)()) throw Stopped();
    probe(message.peer_);
  }
  message.buffer_.reset();
}

// Throws if the connection has failed. Gloo tells the messages that wait for their turn, and not the one whose bytes it
// was just reading (tcp/pair.cc, signalException); but whatever is posted afterwards throws.
void Mesh::probe(int peer) {
  context_->createUnboundBuffer(&probed_, sizeof probed_)->recv(peer, kProbes);
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
  const std::lock_guard<std::mutex> turn(turn_);
  // Without Pair::close(), which would throw away what the kernel has not sent yet.
  context_.reset();
  device_.reset();
  ticker_.reset();
  scratch_.reset();
}

void Mesh::shut() {
  closing_ = true;
  for (int peer = 0; peer < size_; ++peer) {
    if (peer != rank_) context_->getPair(peer)->close();
  }
}

}  // namespace colltensor
