// Stands in for a function of Gloo's own: the dynamic loader looks for what libgloo calls in the library that needed it
// first, so that Gloo finds this one before its own, unless it was linked with -Bsymbolic or another library of the
// process had loaded it before.
//
// Gloo asks for the other end's name once a connection is made, in its own thread. Where that end is gone by then, as
// that of a process that is killed while its group is made, Gloo's function throws, nobody catches it, and this process
// ends. A connection without a name fails as soon as it is read, with an error that reaches whoever waits for it.
#include <gloo/transport/tcp/address.h>
#include <sys/socket.h>

namespace gloo {
namespace transport {
namespace tcp {

__attribute__((visibility("default"))) Address Address::fromPeerName(int fd) {
  sockaddr_storage name{};
  socklen_t size = sizeof name;
  if (::getpeername(fd, reinterpret_cast<sockaddr*>(&name), &size) != 0) name = {};
  return Address(name);
}

}  // namespace tcp
}  // namespace transport
}  // namespace gloo
