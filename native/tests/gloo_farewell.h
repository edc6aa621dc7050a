#pragma once

namespace colltensor {
namespace tests {

// Returns whether all that a rank sent arrives when it closes at once and the link is slow; prints what went wrong.
bool farewell();

}  // namespace tests
}  // namespace colltensor
