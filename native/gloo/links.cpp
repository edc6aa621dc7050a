// Gloo takes whoever connects first to one of its ports for the rank that it waits for, and ends the process at bytes
// that it does not understand. So its pairs get connections here whose other end has proved who it is; what derives from
// its classes is what its own TLS transport derives from them as well.
#include "links.h"

#include <fcntl.h>
#include <gloo/transport/tcp/context.h>
#include <gloo/transport/tcp/pair.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <exception>
#include <functional>
#include <future>
#include <system_error>

namespace colltensor {
namespace {

namespace tcp = gloo::transport::tcp;

constexpr int kNone = -1;

#if __has_include(<gloo/transport/tcp/listener.h>)
// Newer versions: a pair does not listen. The device does, which has nobody to give a connection to.
struct Visit {
  static void make(tcp::Device&, const std::function<void()>& body) { body(); }
};
#else
// Runs something in a device's own thread, which handles no event meanwhile.
class Visit final : public tcp::Handler {
 public:
  static void make(tcp::Device& device, const std::function<void()>& body) {
    Visit visit(device, body);
    std::future<void> ended = visit.ended_.get_future();
    device.registerDescriptor(visit.fd_, EPOLLIN, &visit);
    ended.get();
  }
  ~Visit() override { ::close(fd_); }

 private:
  Visit(tcp::Device& device, const std::function<void()>& body)
      : device_(device), body_(body), fd_(::eventfd(1, EFD_CLOEXEC)) {
    if (fd_ == kNone) throw std::system_error(errno, std::generic_category(), "eventfd");
  }

  void handleEvents(int) override {
    std::promise<void> ended = std::move(ended_);  // at whose end this object goes
    device_.unregisterDescriptor(fd_, this);
    try {
      body_();
    } catch (...) {
      ended.set_exception(std::current_exception());
      return;
    }
    ended.set_value();
  }

  tcp::Device& device_;
  const std::function<void()>& body_;
  const int fd_;
  std::promise<void> ended_;
};
#endif

class Link final : public tcp::Pair {
 public:
  // In the device's thread: Gloo's constructor may listen, and nobody may be accepted before that has ended.
  Link(tcp::Context* context, tcp::Device* device, int peer, std::chrono::milliseconds timeout)
      : Pair(context, device, peer, timeout) {
    if (fd_ == kNone) return;
    const std::lock_guard<std::mutex> lock(m_);
    device_->unregisterDescriptor(fd_, this);
    ::close(fd_);
    fd_ = kNone;
  }

  void connect(int fd) {
    const std::lock_guard<std::mutex> lock(m_);
    const int on = 1, flags = ::fcntl(fd, F_GETFL);
    try {
      if (fd_ != kNone || state_ == CLOSED) throw std::runtime_error("the connection was closed, or made before");
      if (flags == -1 || ::fcntl(fd, F_SETFL, flags | O_NONBLOCK) == -1) {
        throw std::system_error(errno, std::generic_category(), "fcntl");
      }
      ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      // For messages. There is none where the other end has gone by now, which whoever reads finds out.
      sockaddr_storage name{};
      socklen_t size = sizeof name;
      if (::getpeername(fd, reinterpret_cast<sockaddr*>(&name), &size) == 0) peer_ = tcp::Address(name);
      device_->registerDescriptor(fd, EPOLLIN, this);
    } catch (...) {
      ::close(fd);
      throw;
    }
    fd_ = fd;
    changeState(CONNECTED);
  }
};

class Links final : public tcp::Context {
 public:
  Links(const std::shared_ptr<tcp::Device>& device, int rank, int size, std::chrono::milliseconds timeout)
      : Context(device, rank, size) {
    setTimeout(timeout);
  }

  void create() {
    Visit::make(*device_, [this] {
      for (int peer = 0; peer < size; ++peer) {
        if (peer != rank) {
          pairs_[static_cast<std::size_t>(peer)] = std::make_unique<Link>(this, device_.get(), peer, getTimeout());
        }
      }
    });
  }
};

}  // namespace

std::shared_ptr<gloo::transport::Context> create_links(const std::shared_ptr<tcp::Device>& device, int rank, int size,
                                                       std::chrono::milliseconds timeout) {
  const auto links = std::make_shared<Links>(device, rank, size, timeout);
  links->create();
  return links;
}

void link(gloo::transport::Pair& pair, int fd) {
  dynamic_cast<Link&>(pair).connect(fd);
}

}  // namespace colltensor
