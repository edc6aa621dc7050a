// Connections that are reset before Gloo's thread has looked at them, as those of a process that is killed while its
// group is made: the thread throws, and the rank must get an error in place of its end.
#include "gloo_resets.h"

#include <gloo/transport/tcp/device.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "mesh.h"

namespace colltensor {
namespace tests {
namespace {

constexpr int kRounds = 10;
constexpr int kPeers = 100;
constexpr std::chrono::seconds kPatience{20};

void connect_and_reset(const std::vector<char>& address) {
  sockaddr_in target;
  std::memcpy(&target, address.data(), sizeof target);
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  if (::connect(fd, reinterpret_cast<sockaddr*>(&target), sizeof target) != 0) {
    std::fprintf(stderr, "resets: not connected: %s\n", std::strerror(errno));
  }
  const linger reset{1, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
  ::close(fd);
}

}  // namespace

bool resets() {
  bool passed = true;
  for (int round = 0; round < kRounds; ++round) {
    Mesh mesh(gloo::transport::tcp::CreateDevice(gloo::transport::tcp::attr("127.0.0.1")), 0, kPeers, kPatience);
    std::vector<std::vector<char>> addresses(kPeers);
    for (int peer = 1; peer < kPeers; ++peer) {
      addresses[static_cast<std::size_t>(peer)] = mesh.address(peer);
      connect_and_reset(mesh.address(peer));
    }
    const auto began = std::chrono::steady_clock::now();
    std::string why = "connected";
    try {
      mesh.connect(addresses, [&] { return std::chrono::steady_clock::now() - began > kPatience; });
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
