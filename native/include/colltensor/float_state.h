// The floating-point state in which the reductions are defined: subnormals are numbers, results are rounded to nearest.
#pragma once

namespace colltensor {

// Puts this thread into that state while it lives, and then back. A thread may be in another one: XLA's threads flush
// subnormals to zero, and so do those in which torch.set_flush_denormal(True) was called. What is computed in between
// must come from memory and go to memory: the compiler moves neither loads nor stores across the two changes.
class FloatState {
 public:
  FloatState() {
    const Word now = get();
    outer_ = now;
    if (differs(now)) set(kDefault);
  }
  ~FloatState() {
    if (differs(outer_)) set(outer_);
  }
  FloatState(const FloatState&) = delete;
  FloatState& operator=(const FloatState&) = delete;

 private:
#if defined(__x86_64__)
  using Word = unsigned int;
  static constexpr Word kDefault = 0x1f80;  // MXCSR: no exception traps, to nearest, no FTZ, no DAZ
  static constexpr Word kFlags = 0x3f;      // what has happened so far changes nothing
  static bool differs(Word word) { return (word & ~kFlags) != kDefault; }
  static Word get() {
    Word word;
    asm volatile("stmxcsr %0" : "=m"(word) : : "memory");
    return word;
  }
  static void set(Word word) { asm volatile("ldmxcsr %0" : : "m"(word) : "memory"); }
#elif defined(__aarch64__)
  using Word = unsigned long;
  static constexpr Word kDefault = 0;  // FPCR: no traps, to nearest, no flushing, NaNs are passed on
  static bool differs(Word word) { return word != kDefault; }
  static Word get() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word) : : "memory");
    return word;
  }
  static void set(Word word) { asm volatile("msr fpcr, %0" : : "r"(word) : "memory"); }
#else
  using Word = int;
  static constexpr Word kDefault = 0;
  static bool differs(Word) { return false; }
  static Word get() { return 0; }
  static void set(Word) {}
#endif

  Word outer_;
};

}  // namespace colltensor
