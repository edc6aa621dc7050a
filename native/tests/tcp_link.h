#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace colltensor {
namespace tests {

struct TcpLink {
  int dialled, accepted;
};

// A connection over the loopback interface; the accepted end receives through a window of `window` bytes, 0 for the usual.
inline TcpLink tcp_link(int window = 0) {
  const auto checked = [](int result, const char* what) {
    if (result < 0) throw std::system_error(errno, std::generic_category(), what);
    return result;
  };
  const int listener = checked(::socket(AF_INET, SOCK_STREAM, 0), "socket");
  if (window != 0) ::setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &window, sizeof window);
  sockaddr_in place{};
  place.sin_family = AF_INET;
  place.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof place;
  auto* const address = reinterpret_cast<sockaddr*>(&place);
  checked(::bind(listener, address, size), "bind");
  checked(::listen(listener, 1), "listen");
  checked(::getsockname(listener, address, &size), "getsockname");
  const int dialled = checked(::socket(AF_INET, SOCK_STREAM, 0), "socket");
  checked(::connect(dialled, address, size), "connect");
  const int accepted = checked(::accept(listener, nullptr, nullptr), "accept");
  ::close(listener);
  return {dialled, accepted};
}

}  // namespace tests
}  // namespace colltensor
