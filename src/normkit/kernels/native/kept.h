// A caching allocator of torch's own kind: memory that freed outputs leave is lent to the next ones of its size.
//
// Touching fresh memory can cost more than the arithmetic. A tensor that lies here is ordinary in every respect: its
// storage is torch's, with this as its allocator, so that it is also resized. What is kept free is limited by what
// Python grants, which tells it to the other processes of the machine (`kernels/memory.py`).
#pragma once

#include <sys/mman.h>

#include <atomic>
#include <deque>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include "plans.h"

namespace normkit {

constexpr size_t LINE = 64, PAGE = 4096, LARGE_PAGE = 2 << 20;
// Of takes, after which Python is asked anew what may be kept: others may have come or gone.
constexpr int64_t ASKED_EVERY = 1024;

// Some memory from the beginning of a page; what is lent of it begins somewhere in its first page.
struct Block {
  char* start;
  size_t size;
  void* lent = nullptr;
};

// Blocks that no tensor uses, the one freed last at the end.
class Kept {
 public:
  static Kept& of_process() {
    // Never destroyed: a tensor may die when the process ends.
    alignas(Kept) static char place[sizeof(Kept)];
    static Kept* kept = [] {
      // A fork keeps nothing of what its parent keeps: else it holds the pages that its parent goes on writing to.
      pthread_atfork(
          [] { of_process().mutex_.lock(); }, [] { of_process().mutex_.unlock(); },
          [] {
            for (Block* block : of_process().blocks_) destroy(block);
            new (place) Kept();
          });
      return new (place) Kept();
    }();
    return *kept;
  }

  // A block of at least so many bytes behind its first page, or null where the system has none.
  Block* take(size_t bytes) {
    const size_t size = class_of(bytes) + PAGE;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = places_.find(size);
      if (found != places_.end()) {
        const auto place = found->second.back();
        Block* block = *place;
        found->second.pop_back();
        if (found->second.empty()) places_.erase(found);
        blocks_.erase(place);
        held_ -= size;
        return block;
      }
    }
    return fresh(size);
  }

  // Keep a block, or free it where no more may be kept. Called whenever a tensor dies: it waits for nobody's Python.
  void put(Block* block) {
    std::lock_guard<std::mutex> lock(mutex_);
    wished_ = std::max(wished_, held_ + block->size);
    if (block->size > granted_) {
      refused_ = true;
      return destroy(block);
    }
    if (held_ + block->size > granted_) refused_ = true;
    while (held_ + block->size > granted_) let_go_of_the_oldest();
    blocks_.push_back(block);
    places_[block->size].push_back(std::prev(blocks_.end()));
    held_ += block->size;
  }

  void trim(size_t limit) {
    std::lock_guard<std::mutex> lock(mutex_);
    while (held_ > limit) let_go_of_the_oldest();
  }

  // Ask Python how much may be kept, before an output of so many bytes: at the first, where more was wished than it
  // granted, and now and then.
  void ask(size_t bytes) {
    size_t wished;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const bool first = untold_ < 0, refused = refused_ && !capped_;
      if (!first && !refused && ++untold_ < ASKED_EVERY) return;
      untold_ = 0, refused_ = false;
      // More than was refused, so that a process that begins asks a few times and not at every output.
      wished = granted_ == 0 ? 2 * class_of(bytes) : refused ? 2 * wished_ : std::max(wished_, held_);
      wished_ = 0;
    }
    const size_t granted = under_lock([&] {
      Owned given(PyObject_CallFunction(callbacks().grant, "n", static_cast<Py_ssize_t>(wished)));
      if (!given) throw PythonError();
      return static_cast<size_t>(as_integer(given.object));
    });
    std::lock_guard<std::mutex> lock(mutex_);
    granted_ = granted, capped_ = granted < wished;
    while (held_ > granted_) let_go_of_the_oldest();
  }

  // Let go of everything, and of what was granted.
  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    while (!blocks_.empty()) let_go_of_the_oldest();
    granted_ = wished_ = 0, untold_ = -1, refused_ = capped_ = false;
  }

  size_t size() {
    std::lock_guard<std::mutex> lock(mutex_);
    return held_;
  }

  // Whether anything may be kept: otherwise torch's own memory serves better.
  bool keeps() {
    std::lock_guard<std::mutex> lock(mutex_);
    return granted_ != 0;
  }

 private:
  // Sizes an eighth of a power of two apart share blocks; large ones are kept to the page.
  static size_t class_of(size_t bytes) {
    size_t step = PAGE;
    if (bytes < 2 * LARGE_PAGE) {
      while (16 * step < bytes) step *= 2;
    }
    return (bytes + step - 1) / step * step;
  }

  static Block* fresh(size_t size) {
    // Of the system and back to it: in the heap of malloc, blocks that begin at large pages leave holes that stay.
    const size_t alignment = size >= LARGE_PAGE ? LARGE_PAGE : PAGE, mapped = size + alignment - PAGE;
    void* given = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (given == MAP_FAILED) return nullptr;
    char* first = static_cast<char*>(given);
    const size_t before = (alignment - reinterpret_cast<size_t>(first) % alignment) % alignment;
    const size_t behind = mapped - before - size;
    if (before != 0) munmap(first, before);
    if (behind != 0) munmap(first + before + size, behind);
    if (size >= LARGE_PAGE) madvise(first + before, size, MADV_HUGEPAGE);  // advice: a refusal changes nothing
    return new Block{first + before, size};
  }

  static void destroy(Block* block) {
    munmap(block->start, block->size);
    delete block;
  }

  void let_go_of_the_oldest() {
    Block* block = blocks_.front();
    const auto found = places_.find(block->size);
    found->second.pop_front();
    if (found->second.empty()) places_.erase(found);
    blocks_.pop_front();
    held_ -= block->size;
    destroy(block);
  }

  std::mutex mutex_;
  std::list<Block*> blocks_;
  std::unordered_map<size_t, std::deque<std::list<Block*>::iterator>> places_;  // by size, each in the order of blocks_
  size_t held_ = 0, granted_ = 0, wished_ = 0;
  int64_t untold_ = -1;  // outputs since Python was asked; -1 where it never was
  bool refused_ = false, capped_ = false;
};

class Allocator final : public c10::Allocator {
 public:
  static Allocator& of_process() {
    static auto* allocator = new Allocator();
    return *allocator;
  }

  // An uninitialized tensor of the shape, type and strides of x, which is packed. It begins half a page away from x: a
  // processor takes a load for one of what was just stored where both agree in their last twelve bits, and waits.
  Tensor empty_like(const Tensor& x) {
    computed_from() = x.const_data_ptr();
    Tensor y = at::detail::empty_strided_generic(
        x.sizes(), x.strides(), this, c10::DispatchKeySet(c10::DispatchKey::CPU), x.scalar_type());
    computed_from() = nullptr;
    return y;
  }

  c10::DataPtr allocate(size_t bytes) override {
    Kept& kept = Kept::of_process();
    if (bytes < callbacks().kept_from || !kept.keeps()) return c10::GetCPUAllocator()->allocate(bytes);
    Block* block = kept.take(bytes);
    if (block == nullptr) {
      kept.trim(0);  // what is kept goes first; then the words for what cannot be had are torch's
      block = kept.take(bytes);
      if (block == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    }
    const size_t away = (reinterpret_cast<size_t>(computed_from()) + PAGE / 2) % PAGE / LINE * LINE;
    block->lent = block->start + away;
    c10::profiledCPUMemoryReporter().New(block->lent, bytes);
    return {block->lent, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* into, const void* from, size_t bytes) const override { default_copy_data(into, from, bytes); }

 private:
  static const void*& computed_from() {
    static thread_local const void* address = nullptr;
    return address;
  }

  static void give_back(void* block) {
    c10::profiledCPUMemoryReporter().Delete(static_cast<Block*>(block)->lent);
    Kept::of_process().put(static_cast<Block*>(block));
  }
};

}  // namespace normkit
