// Transfers between two ranks, through the mailbox of the ordered pair. Both sides post a signature when they come
// and compare; then the sender fills pieces of its staging and the receiver empties them. A send returns when the
// receiver has taken everything; of a message of one piece when the receiver has come and they agree, which saves a
// crossing between the processors: the message stays where it lies until it is taken. Sending and receiving go on side
// by side, so that rings and swaps do not block.
#include <algorithm>

#include "colltensor/group.h"

namespace colltensor {
namespace {

// What no call is signed with.
constexpr Signature kRefusal{{~std::uint64_t{0}, ~std::uint64_t{0}, ~std::uint64_t{0}, ~std::uint64_t{0}}};

}  // namespace

class PairSide {
 public:
  PairSide(Group& group, const Group::Transfer* transfer)
      : group_(group), transfer_(transfer), finished_(transfer == nullptr) {
    if (finished_) return;
    const std::size_t nbytes = transfer->count * transfer->item;
    hushed_ = nbytes <= Group::kBriefNbytes;
    if (nbytes <= place_nbytes(group)) {
      piece_ = transfer->count;
    } else {
      piece_ = place_nbytes(group) / transfer->item;
      pieces_ = static_cast<std::uint32_t>((transfer->count + piece_ - 1) / piece_);
    }
  }

  bool finished() const { return finished_; }
  bool mismatch() const { return mismatch_; }
  // Whether the peer has ended this because it waits for what this rank does not do.
  bool refused() const { return mismatch_ && other_->signature == kRefusal; }
  // Of a call that was pending, whose arguments lie elsewhere now.
  void rebind(const Group::Transfer* transfer) { transfer_ = transfer; }
  int peer() const { return transfer_->peer; }
  bool bound() const { return transfer_->bound; }

  bool answered = false;  // the peer's transfer was refused that crosses this one

  // Wakes the peer if it sleeps and was told nothing yet; before this rank waits, and at the end.
  void knock() {
    if (transfer_ == nullptr || !untold_) return;
    untold_ = false;
    group_.knock(peer());
  }

 protected:
  static constexpr std::size_t kPieces = 8;

  static std::size_t place_nbytes(const Group& group) { return group.half_nbytes_ / kPieces; }

  std::size_t first(std::uint32_t piece) const { return piece * piece_; }
  std::size_t length(std::uint32_t piece) const { return std::min(piece_, transfer_->count - first(piece)); }
  // Where the sender's pieces lie: in the half that its next collective begins with, which nobody else uses yet. One
  // piece alone lies beside that of the transfer before, which may not have been taken yet.
  char* where(int sender, unsigned parity, std::uint32_t piece) const {
    const std::size_t place = pieces_ == 1 ? number_ : piece % kPieces;
    return group_.half(sender, parity) + place * place_nbytes(group_);
  }
  static bool reached(const Slip& slip, std::uint32_t step) {
    return Group::reached(slip.count.load(std::memory_order_acquire), step);
  }
  // Of a short message sleepers are looked for later, as in a collective's arrival: the fence is cheap by then.
  void publish(Slip& slip, std::uint32_t step) {
    slip.count.store(step, std::memory_order_release);
    untold_ = true;
    if (!hushed_) knock();
  }

  Group& group_;
  const Group::Transfer* transfer_;
  bool finished_, mismatch_ = false;
  bool compared_ = false, hushed_ = false, untold_ = false;
  std::size_t piece_ = 0;  // elements
  std::uint32_t pieces_ = 1;
  std::uint32_t next_ = 0;  // piece
  std::uint32_t mine_ = 0, theirs_ = 0, number_ = 0;  // steps before this transfer, and the parity of its number
  Slip *own_ = nullptr, *other_ = nullptr;
};

// A sender's count grows by one for each piece, the first being its arrival; a receiver's by one for its arrival and
// one for each piece.
class Sender : public PairSide {
 public:
  Sender(Group& group, const Group::Transfer* transfer) : PairSide(group, transfer) {
    if (finished_) return;
    mine_ = group.sent_[peer()];
    theirs_ = group.taken_[peer()];
    number_ = group.sends_[peer()]++ & 1;
    Mailbox& box = group.layout_.mailbox(group.rank_, peer());
    own_ = &box.sender[number_];
    other_ = &box.receiver[number_];
  }

  // The receiver reads large messages from this rank's memory if it `may` and that is faster. Where both ranks send and
  // receive it can take half the time (16 MiB on a Xeon: 1.3 ms instead of 2.5; on an EPYC 2.4, not 1.4), and where one
  // only sends a third more (1 MiB: 129 us, not 81).
  Outcome arrive(bool may_be_read, std::int64_t deadline_ns) {
    if (finished_) return Outcome::kDone;
    const Outcome outcome = group_.wait_for_half(group_.parity(), deadline_ns, spared(group_, transfer_));
    if (outcome != Outcome::kDone) return outcome;
    say();
    const std::size_t nbytes = transfer_->count * transfer_->item;
    choice_ = may_be_read ? group_.choice(Group::kPairKind, nbytes) : nullptr;
    if (choice_ != nullptr && choice_->ripe()) choice_->settle(choice_->best());  // the receiver takes what comes
    if (choice_ != nullptr && choice_->reads() && group_.can_be_read(*transfer_->view, nbytes)) {
      own_->address = reinterpret_cast<std::uint64_t>(transfer_->view->data());
      pieces_ = 1;
    }
    const std::int64_t before_ns = choice_ == nullptr ? 0 : now_ns();
    put();
    if (choice_ != nullptr) put_ns_ = now_ns() - before_ns;
    return Outcome::kDone;
  }

  // In place of a message, to a receiver that has arrived.
  void refuse() {
    say();
    ++next_;
    publish(*own_, mine_ + next_);
    advance();
    knock();
  }

  // Whether this may be begun beside others: the receiver waits, and nobody uses the staging.
  bool may_begin() const {
    return reached(*other_, theirs_ + 1) && !group_.sending_ &&
           group_.is_half_free(group_.parity(), spared(group_, transfer_));
  }

  // Whose message may still lie in the half of staging that this one goes to: the peer's, beside it.
  static int spared(const Group& group, const Group::Transfer* transfer) {
    if (transfer == nullptr) return kNoRank;
    return transfer->count * transfer->item <= place_nbytes(group) ? transfer->peer : kNoRank;
  }

  bool ready() const { return !finished_ && reached(*other_, wanted()); }

  // After the end of the call, whose other transfer is part of what this one's way costs.
  void note_time() {
    if (choice_ == nullptr) return;
    const bool was_read = own_->address != 0;
    if (was_read != choice_->reads()) return;
    const std::size_t nbytes = transfer_->count * transfer_->item;
    choice_->note(was_read ? Choice::kRead : Choice::kStage, put_ns_ + now_ns() - began_ns_, nbytes);
  }

  void advance() {
    while (ready()) {
      if (!compared_) {
        compared_ = true;
        if (!(other_->signature == transfer_->signature)) {
          mismatch_ = true;
          return finish(mine_ + 1, theirs_ + 1);
        }
        if (choice_ != nullptr) began_ns_ = now_ns();
      } else if (next_ < pieces_) {
        put();
      } else {
        finish(mine_ + pieces_, theirs_ + 1 + pieces_);
        if (may_lie()) group_.untaken_[group_.parity()].push_back({peer(), other_, theirs_ + 1 + pieces_});
        return;
      }
    }
  }

 private:
  void say() {
    own_->signature = transfer_->signature;
    own_->half = group_.parity();
    own_->address = 0;
    own_->bound = transfer_->bound;
  }
  // The receiver's count that lets this side go on: its arrival, a piece's place that it has emptied, or the end.
  std::uint32_t wanted() const {
    if (!compared_ || may_lie()) return theirs_ + 1;
    if (next_ == pieces_) return theirs_ + 1 + pieces_;
    return next_ < kPieces ? theirs_ + 1 : theirs_ + 1 + (next_ - static_cast<std::uint32_t>(kPieces) + 1);
  }
  // Whether the message need not be taken yet when the call ends. The time of a large one, which is measured, has an end.
  bool may_lie() const { return pieces_ == 1 && next_ == 1 && own_->address == 0 && choice_ == nullptr; }
  void put() {
    if (transfer_->count != 0 && own_->address == 0) {
      transfer_->view->read(first(next_), length(next_), where(group_.rank_, group_.parity(), next_));
    }
    ++next_;
    publish(*own_, mine_ + next_);
  }
  void finish(std::uint32_t mine, std::uint32_t theirs) {
    group_.forget_untaken(peer());  // it has come, and so has taken what was sent before
    group_.sent_[peer()] = mine;
    group_.taken_[peer()] = theirs;
    finished_ = true;
  }

  Choice* choice_ = nullptr;
  std::int64_t began_ns_ = 0, put_ns_ = 0;  // since the receiver came, and what was done before
};

class Receiver : public PairSide {
 public:
  Receiver(Group& group, const Group::Transfer* transfer, Store store) : PairSide(group, transfer), store_(store) {
    if (finished_) return;
    mine_ = group.received_[peer()];
    theirs_ = group.given_[peer()];
    number_ = group.receives_[peer()]++ & 1;
    Mailbox& box = group.layout_.mailbox(peer(), group.rank_);
    own_ = &box.receiver[number_];
    other_ = &box.sender[number_];
  }

  void arrive() {
    if (finished_) return;
    own_->signature = transfer_->signature;
    own_->bound = transfer_->bound;
    publish(*own_, mine_ + 1);
  }

  Outcome outcome() const { return outcome_; }  // of reading the sender's memory

  bool ready() const { return !finished_ && reached(*other_, theirs_ + 1 + next_); }

  void advance() {
    while (ready()) {
      if (!compared_) {
        compared_ = true;
        if (!(other_->signature == transfer_->signature)) {
          mismatch_ = true;
          return finish(mine_ + 1, theirs_ + 1);
        }
        if (transfer_->agreed != nullptr) {
          (*transfer_->agreed)();
        } else if (group_.hooks_.agreed != nullptr) {
          group_.hooks_.agreed(group_.hooks_.agreed_context);
        }
      }
      const std::uint64_t address = other_->address;
      if (address != 0) {
        pieces_ = 1;
        outcome_ = group_.read_into(*transfer_->view, peer(), address, 0, transfer_->count, transfer_->item);
        if (outcome_ != Outcome::kDone) return;
      } else if (transfer_->count != 0) {
        transfer_->view->write(first(next_), length(next_), where(peer(), other_->half, next_), store_);
      }
      ++next_;
      publish(*own_, mine_ + 1 + next_);
      if (next_ == pieces_) return finish(mine_ + 1 + pieces_, theirs_ + pieces_);
    }
  }

 private:
  void finish(std::uint32_t mine, std::uint32_t theirs) {
    group_.received_[peer()] = mine;
    group_.given_[peer()] = theirs;
    finished_ = true;
  }

  const Store store_;
  Outcome outcome_ = Outcome::kDone;
};

class PairCondition final : public Condition {
 public:
  PairCondition(const Group& group, const Sender& sender, const Receiver& receiver, bool brief)
      : group_(group), sender_(sender), receiver_(receiver), brief_(brief) {}
  bool ready() const override {
    return sender_.ready() || receiver_.ready() || (!brief_ && (crossed_sends() || crossed_receives()));
  }
  // Whether two ranks wait for each other that both send, or both receive. What they are looked at for is published
  // after what is looked at next: a rank that does both says so first.
  bool crossed_sends() const {
    return !sender_.finished() && sender_.bound() && group_.only_sends(sender_.peer()) && !sender_.ready();
  }
  bool crossed_receives() const {
    return !receiver_.finished() && receiver_.bound() && group_.only_receives(receiver_.peer()) && !receiver_.ready();
  }
  bool needs_cpu(std::uint32_t cpu) const override {
    return (!sender_.finished() && group_.is_on(sender_.peer(), cpu)) ||
           (!receiver_.finished() && group_.is_on(receiver_.peer(), cpu));
  }
  RankSet missing() const override {
    RankSet set;
    if (!sender_.finished() && !sender_.ready()) set.add(sender_.peer());
    if (!receiver_.finished() && !receiver_.ready()) set.add(receiver_.peer());
    return set;
  }

 private:
  const Group& group_;
  const Sender& sender_;
  const Receiver& receiver_;
  const bool brief_;
};

struct Group::Pair {
  Sender sender;
  Receiver receiver;
};

Outcome Group::transfer(Transfer* send, Transfer* recv, std::int64_t deadline_ns) {
  Outcome outcome = enter();
  if (outcome != Outcome::kDone) return outcome;
  if (send != nullptr && recv != nullptr && send->peer == recv->peer) send->bound = recv->bound = false;
  if (resumed_) {
    Pair pair = std::move(*pair_);
    pair.sender.rebind(send);
    pair.receiver.rebind(recv);
    return transfer(pair, send, recv, deadline_ns);
  }
  const auto size = [](const Transfer* side) { return side == nullptr ? 0 : side->count * side->item; };
  const bool brief = deadline_ns == kBrief;
  if (brief && (std::max(size(send), size(recv)) > kBriefNbytes || !is_half_free(parity(), Sender::spared(*this, send)))) {
    return Outcome::kLarge;
  }
  // As if the peers do the same; what comes one way alone is not streamed.
  const Store store = send == nullptr ? Store::kCached : storing(2 * (size(send) + size(recv)));
  Pair pair{Sender(*this, send), Receiver(*this, recv, store)};
  pair.receiver.arrive();
  if (!brief) pair.receiver.knock();  // the sender's half may be waited for
  outcome = pair.sender.arrive(recv != nullptr, deadline_ns);
  return outcome == Outcome::kDone ? transfer(pair, send, recv, deadline_ns) : outcome;
}

Outcome Group::transfer(Pair& pair, Transfer* send, Transfer* recv, std::int64_t deadline_ns) {
  auto& [sender, receiver] = pair;
  const bool brief = deadline_ns == kBrief;
  const PairCondition condition(*this, sender, receiver, brief);
  RankLine& own = *lines_[rank_];
  int spins = kBriefSpins;
  for (;;) {
    sender.advance();
    receiver.advance();
    if (receiver.outcome() != Outcome::kDone) return receiver.outcome();
    // Who refuses waits for the other, who refuses in turn; each once, because what comes next may be another call's.
    if (!sender.answered && ((!brief && condition.crossed_sends()) || (sender.refused() && only_sends(sender.peer())))) {
      sender.answered = true;
      refuse_send(sender.peer());
    }
    if (!receiver.answered &&
        ((!brief && condition.crossed_receives()) || (receiver.refused() && only_receives(receiver.peer())))) {
      receiver.answered = true;
      refuse_recv(receiver.peer());
    }
    if (sender.finished() && receiver.finished()) break;
    if (brief && spin_for(condition, spins)) continue;
    sender.knock();
    receiver.knock();
    if (brief) {
      pair_ = std::make_shared<Pair>(std::move(pair));
      return Outcome::kPending;
    }
    const auto rest = [](const PairSide& side) { return side.finished() ? 0 : side.peer() + 1; };
    peers_.store((std::int64_t{rest(sender)} << 16) + rest(receiver), std::memory_order_relaxed);
    const Outcome outcome = wait_until(condition, own.door, own.dozing, deadline_ns);
    peers_.store(0, std::memory_order_relaxed);
    if (outcome != Outcome::kDone) return outcome;
  }
  sender.knock();
  receiver.knock();
  if (send != nullptr) send->mismatch = sender.mismatch();
  if (recv != nullptr) recv->mismatch = receiver.mismatch();
  if (sender.mismatch() || receiver.mismatch()) return Outcome::kMismatch;
  sender.note_time();
  return Outcome::kDone;
}

bool Group::only_sends(int peer) const {
  const Slip& slip = layout_.mailbox(peer, rank_).sender[receives_[peer] & 1];
  return reached(slip.count.load(std::memory_order_acquire), given_[peer] + 1) && slip.bound != 0;
}

bool Group::only_receives(int peer) const {
  const Slip& slip = layout_.mailbox(rank_, peer).receiver[sends_[peer] & 1];
  return reached(slip.count.load(std::memory_order_acquire), taken_[peer] + 1) && slip.bound != 0;
}

void Group::refuse_send(int peer) {
  const View nothing(nullptr, 1);
  const Transfer refusal{&nothing, 0, 1, peer, kRefusal, false, false};
  Receiver receiver(*this, &refusal, Store::kCached);
  receiver.arrive();
  receiver.advance();
  receiver.knock();
}

void Group::refuse_recv(int peer) {
  const View nothing(nullptr, 1);
  const Transfer refusal{&nothing, 0, 1, peer, kRefusal, false, false};
  Sender(*this, &refusal).refuse();
}

// A thread's transfer beside those of others.
class BesideCondition final : public Condition {
 public:
  BesideCondition(Group& group, int peer, std::function<bool()> ready)
      : group_(group), peer_(peer), ready_(std::move(ready)) {}
  bool ready() const override {
    const std::lock_guard<std::mutex> lock(group_.beside_);
    return ready_();
  }
  bool needs_cpu(std::uint32_t cpu) const override { return group_.is_on(peer_, cpu); }
  RankSet missing() const override {
    RankSet set;
    if (!ready()) set.add(peer_);
    return set;
  }

 private:
  Group& group_;
  const int peer_;
  const std::function<bool()> ready_;
};

template <class Side>
Outcome Group::finish_beside(Side& side, std::unique_lock<std::mutex>& lock, std::int64_t deadline_ns) {
  RankLine& own = *lines_[rank_];
  const BesideCondition condition(*this, side.peer(), [&side] { return side.ready(); });
  for (;;) {
    side.advance();
    side.knock();
    if (side.finished()) return side.mismatch() ? Outcome::kMismatch : Outcome::kDone;
    lock.unlock();
    const Outcome outcome = wait_until(condition, own.door, own.dozing, deadline_ns);
    lock.lock();
    if (outcome != Outcome::kDone) return outcome;
  }
}

// A send begins when its receiver waits: until then it needs no staging, in which there is room for one at a time. The
// receiver takes what comes, whatever else it waits for.
Outcome Group::transfer_beside(Transfer& transfer, bool sends, std::int64_t deadline_ns) {
  std::unique_lock<std::mutex> lock(beside_);
  const Outcome entered = enter();
  if (entered != Outcome::kDone) return entered;
  transfer.bound = false;
  Outcome outcome;
  if (sends) {
    RankLine& own = *lines_[rank_];
    Sender sender(*this, &transfer);
    const BesideCondition condition(*this, transfer.peer, [&sender] { return sender.may_begin(); });
    while (!sender.may_begin()) {
      lock.unlock();
      outcome = wait_until(condition, own.door, own.dozing, deadline_ns);
      lock.lock();
      if (outcome != Outcome::kDone) return outcome;
    }
    sending_ = true;
    outcome = sender.arrive(false, deadline_ns);
    if (outcome == Outcome::kDone) outcome = finish_beside(sender, lock, deadline_ns);
    sending_ = false;
    own.door.fetch_add(1, std::memory_order_release);  // for threads of this rank that wait for the staging
    futex_wake_all(&own.door);
  } else {
    Receiver receiver(*this, &transfer, Store::kCached);
    receiver.arrive();
    outcome = finish_beside(receiver, lock, deadline_ns);
    if (receiver.outcome() != Outcome::kDone) outcome = receiver.outcome();
  }
  transfer.mismatch = outcome == Outcome::kMismatch;
  return outcome;
}

}  // namespace colltensor
