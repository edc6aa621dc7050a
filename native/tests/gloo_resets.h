#pragma once

namespace colltensor {
namespace tests {

// Whether the process outlives connections that their other end resets at once. Prints what is wrong.
bool resets();

}  // namespace tests
}  // namespace colltensor
