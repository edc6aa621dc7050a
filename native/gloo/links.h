// Gloo's TCP connections over sockets that are connected elsewhere. No Python, no tvm-ffi.
#pragma once

#include <gloo/transport/context.h>
#include <gloo/transport/tcp/device.h>

#include <chrono>
#include <memory>

namespace colltensor {

// A context that has a pair for every other rank, none of them connected. Gloo accepts and dials nothing for them.
std::shared_ptr<gloo::transport::Context> create_links(const std::shared_ptr<gloo::transport::tcp::Device>& device,
                                                       int rank, int size, std::chrono::milliseconds timeout);

// Gives a pair of such a context its socket, connected, which it owns from now on; on failure too.
void link(gloo::transport::Pair& pair, int fd);

}  // namespace colltensor
