// Which way large messages go, given what both ways took.
#include "check.h"
#include "colltensor/choice.h"

namespace colltensor {
namespace tests {
namespace {

constexpr std::size_t kNbytes = 1 << 18;

// Makes calls of given times until the choice is to be settled; the first four must be read.
int measure(Choice& choice, std::int64_t staged_ns, std::int64_t read_ns) {
  int calls = 0;
  while (!choice.ripe() && calls < 100) {
    const bool reads = choice.reads();
    expect(reads == (calls < 4), "call %d is %s", calls, reads ? "read" : "staged");
    // What disturbs a call only ever makes it longer.
    const std::int64_t disturbed = calls % 4 != 3 ? 1'000'000'000 : 0;
    choice.note(reads ? Choice::kRead : Choice::kStage, (reads ? read_ns : staged_ns) + disturbed, kNbytes);
    ++calls;
  }
  return calls;
}

void settled(std::int64_t staged_ns, std::int64_t read_ns, bool reads) {
  Choice choice;
  for (int round = 0; round < 2; ++round) {  // all is tried again some time
    const int calls = measure(choice, staged_ns, read_ns);
    expect(calls == 8, "%d calls were measured", calls);
    choice.settle(choice.best());
    int kept = 0;
    while (!choice.ripe() && choice.reads() == reads && kept < 255) {
      choice.note(reads ? Choice::kRead : Choice::kStage, 1, kNbytes);
      ++kept;
    }
    expect(kept == 255, "%lld staged and %lld read: kept for %d calls", static_cast<long long>(staged_ns),
           static_cast<long long>(read_ns), kept);
  }
}

}  // namespace

void test_choices() {
  settled(1000, 999, true);
  settled(999, 1000, false);
  settled(50'000'000'000'000, 60'000'000'000'000, false);  // more than fits
  Choices<2> choices;
  expect(&choices.of(0, 1 << 20) == &choices.of(0, (2 << 20) - 1), "one power of two has two choices");
  expect(&choices.of(0, 1 << 20) != &choices.of(0, 2 << 20), "two powers of two have one choice");
  expect(&choices.of(0, 1 << 20) != &choices.of(1, 1 << 20), "two kinds have one choice");
  expect(&choices.of(1, std::size_t{1} << 29) == &choices.of(1, ~std::size_t{0}), "the largest sizes have no choice");
}

}  // namespace tests
}  // namespace colltensor
