// A rank that closes as soon as what it sent has left its memory, over a link that needs longer than a tick for it: the
// other one must get all of it, though it looks whether the connection has failed meanwhile.
//
// The link is a relay on the loopback interface with a small receive window. The sender's address is the highest, so
// that it is the one that dials (gloo/transport/tcp/pair.cc), and the relay is what it is told to dial.
#include "gloo_farewell.h"

#include <arpa/inet.h>
#include <gloo/transport/tcp/device.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "collectives.h"

namespace colltensor {
namespace tests {
namespace {

constexpr std::size_t kNbytes = 2 << 20;   // what the sender's kernel takes at once, and the relay's does not
constexpr int kWindow = 64 << 10;
constexpr useconds_t kPieceUs = 15'000;    // a piece of kWindow takes as long: all of it half a second
constexpr std::chrono::seconds kPatience{20};

const char* const kReceiver = "127.0.0.1";
const char* const kRelay = "127.0.0.2";
const char* const kSender = "127.0.0.3";

class Relay {
 public:
  explicit Relay(const std::vector<char>& target) : listener_(::socket(AF_INET, SOCK_STREAM, 0)), address_(target) {
    std::memcpy(&target_, target.data(), sizeof target_);
    sockaddr_in own{};
    own.sin_family = AF_INET;
    ::inet_pton(AF_INET, kRelay, &own.sin_addr);
    socklen_t size = sizeof own;
    ::setsockopt(listener_, SOL_SOCKET, SO_RCVBUF, &kWindow, sizeof kWindow);
    usable_ = ::bind(listener_, reinterpret_cast<sockaddr*>(&own), sizeof own) == 0 && ::listen(listener_, 1) == 0 &&
              ::getsockname(listener_, reinterpret_cast<sockaddr*>(&own), &size) == 0;
    std::memcpy(address_.data(), &own, sizeof own);
    thread_ = std::thread([this] { run(); });
  }
  ~Relay() {
    ::shutdown(listener_, SHUT_RDWR);
    thread_.join();
    ::close(listener_);
  }
  Relay(const Relay&) = delete;

  bool usable() const { return usable_; }
  const std::vector<char>& address() const { return address_; }

 private:
  void run() {
    const int sender = ::accept(listener_, nullptr, nullptr);
    if (sender < 0) return;
    const int receiver = ::socket(AF_INET, SOCK_STREAM, 0);
    if (::connect(receiver, reinterpret_cast<sockaddr*>(&target_), sizeof target_) == 0) {
      pollfd ends[] = {{sender, POLLIN, 0}, {receiver, POLLIN, 0}};
      while (::poll(ends, 2, static_cast<int>(std::chrono::milliseconds(kPatience).count())) > 0) {
        if (ends[1].revents != 0 && !pass(receiver, sender)) break;
        if (ends[0].revents == 0) continue;
        if (!pass(sender, receiver)) break;
        ::usleep(kPieceUs);
      }
    }
    ::close(sender);
    ::close(receiver);
  }

  static bool pass(int from, int to) {
    std::vector<char> piece(kWindow);
    const ssize_t came = ::recv(from, piece.data(), piece.size(), 0);
    if (came <= 0) return false;
    ::send(to, piece.data(), static_cast<std::size_t>(came), MSG_NOSIGNAL);  // nobody reads at an end that is closed
    return true;
  }

  const int listener_;
  std::vector<char> address_;
  sockaddr_in target_;
  bool usable_;
  std::thread thread_;
};

// Whether all arrives at a rank whose looks around, in between, take some time.
bool arrives(std::chrono::milliseconds look) {
  namespace tcp = gloo::transport::tcp;
  const auto device = [](const char* address) { return tcp::CreateDevice(tcp::attr(address)); };
  Mesh receiver(device(kReceiver), 0, 2, kPatience), sender(device(kSender), 1, 2, kPatience);
  Relay relay(receiver.address(1));
  if (!relay.usable()) {
    std::fprintf(stderr, "FAILED: no relay at %s\n", kRelay);
    return false;
  }
  const auto began = std::chrono::steady_clock::now();
  const Check patient = [began] { return std::chrono::steady_clock::now() - began > kPatience; };
  const Check slow = [&] {
    std::this_thread::sleep_for(look);
    return patient();
  };
  std::vector<char> sent(kNbytes), received(kNbytes);
  for (std::size_t i = 0; i < kNbytes; ++i) sent[i] = static_cast<char>(i * 7 + i / 251);

  std::thread leaver([&] {
    try {
      sender.connect({relay.address(), {}}, patient);
      sender.run(patient, [&] {
        Message message = sender.send(0, sent.data(), sent.size());
        sender.finish(message);
      });
    } catch (const std::exception& error) {
      std::fprintf(stderr, "FAILED: the rank that leaves: %s\n", error.what());
    }
    sender.close();
  });
  std::string why;
  try {
    receiver.connect({{}, sender.address(0)}, patient);
    receiver.run(slow, [&] {
      Message message = receiver.receive(1, received.data(), received.size());
      receiver.finish(message);
    });
  } catch (const std::exception& error) {
    why = error.what();
  }
  leaver.join();
  receiver.close();
  if (why.empty() && received != sent) why = "other bytes came";
  if (!why.empty()) {
    std::fprintf(stderr, "FAILED: a message of a rank that has closed, with looks of %d ms: %s\n",
                 static_cast<int>(look.count()), why.c_str());
  }
  return why.empty();
}

}  // namespace

bool farewell() {
  // The second one has got all, and the end of the connection after it, when its first look is over.
  return arrives(std::chrono::milliseconds(0)) && arrives(std::chrono::milliseconds(1500));
}

}  // namespace tests
}  // namespace colltensor
