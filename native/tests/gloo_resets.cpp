// Connections that are reset before Gloo's thread has looked at them, as those of a process that is killed while its
// group is made: the rank must get an error in place of its end.
#include "gloo_resets.h"

#include <gloo/transport/tcp/device.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <string>

#include "mesh.h"
#include "tcp_link.h"

namespace colltensor {
namespace tests {
namespace {

constexpr int kRounds = 10;
constexpr int kPeers = 100;
constexpr std::chrono::seconds kPatience{20};

// Returns a connection whose other end has reset it.
int reset_link() {
  const TcpLink ends = tcp_link();
  const linger reset{1, 0};
  ::setsockopt(ends.accepted, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
  ::close(ends.accepted);
  return ends.dialled;
}

}  // namespace

bool resets() {
  bool passed = true;
  for (int round = 0; round < kRounds; ++round) {
    Mesh mesh(gloo::transport::tcp::CreateDevice(gloo::transport::tcp::attr("127.0.0.1")), 0, kPeers, kPatience);
    const auto began = std::chrono::steady_clock::now();
    const Check patient = [&] { return std::chrono::steady_clock::now() - began > kPatience; };
    std::string why = "it received";
    try {
      for (int peer = 1; peer < kPeers; ++peer) mesh.link(peer, reset_link());
      char byte;
      mesh.run(patient, [&] {
        Message message = mesh.receive(1, &byte, sizeof byte);
        mesh.finish(message);
      });
    } catch (const Stopped&) {
      why = "it waited";
    } catch (const std::exception&) {
      why.clear();
    }
    mesh.close();
    if (why.empty()) continue;
    passed = false;
    std::fprintf(stderr, "FAILED: a rank whose connections were reset: %s\n", why.c_str());
  }
  return passed;
}

}  // namespace tests
}  // namespace colltensor
