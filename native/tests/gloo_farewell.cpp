// A rank that closes as soon as what it sent has left its memory, over a link that needs longer than a tick for it: the
// other one must get all of it, though it looks whether the connection has failed meanwhile.
//
// The link is a relay on the loopback interface with a small receive window.
#include "gloo_farewell.h"

#include <gloo/transport/tcp/device.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <thread>

#include "collectives.h"
#include "tcp_link.h"

namespace colltensor {
namespace tests {
namespace {

constexpr std::size_t kNbytes = 2 << 20;   // what the sender's kernel takes at once, and the relay's does not
constexpr int kWindow = 64 << 10;
constexpr useconds_t kPieceUs = 15'000;    // a piece of kWindow takes as long: all of it half a second
constexpr std::chrono::seconds kPatience{20};

class Relay {
 public:
  Relay() : to_sender_(tcp_link(kWindow)), to_receiver_(tcp_link()), thread_([this] { run(); }) {}
  ~Relay() { thread_.join(); }
  Relay(const Relay&) = delete;

  // The ends for the two ranks.
  int sender() const { return to_sender_.dialled; }
  int receiver() const { return to_receiver_.dialled; }

 private:
  void run() {
    const int sender = to_sender_.accepted, receiver = to_receiver_.accepted;
    pollfd ends[] = {{sender, POLLIN, 0}, {receiver, POLLIN, 0}};
    while (::poll(ends, 2, static_cast<int>(std::chrono::milliseconds(kPatience).count())) > 0) {
      if (ends[1].revents != 0 && !pass(receiver, sender)) break;
      if (ends[0].revents == 0) continue;
      if (!pass(sender, receiver)) break;
      ::usleep(kPieceUs);
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

  const TcpLink to_sender_, to_receiver_;
  std::thread thread_;
};

// Whether all arrives at a rank whose looks around, in between, take some time.
bool arrives(std::chrono::milliseconds look) {
  namespace tcp = gloo::transport::tcp;
  Mesh receiver(tcp::CreateDevice(tcp::attr("127.0.0.1")), 0, 2, kPatience);
  Mesh sender(tcp::CreateDevice(tcp::attr("127.0.0.1")), 1, 2, kPatience);
  Relay relay;
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
      sender.link(0, relay.sender());
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
    receiver.link(1, relay.receiver());
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
