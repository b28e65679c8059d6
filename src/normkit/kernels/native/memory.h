// Memory for outputs: what is freed is kept for the next output of its size, for touching fresh memory can cost more
// than the arithmetic. An allocator of torch's own kind, so that such a tensor is ordinary in every respect.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/Allocator.h>

namespace normkit {

// Bytes from which memory is kept: below it the system's own allocator loses no pages between two steps.
constexpr size_t KEPT_FROM = 1 << 16;
constexpr size_t LARGE_PAGE = 2 << 20;
constexpr size_t LARGE_FROM = 4 << 20;  // bytes from which large pages are asked for
constexpr size_t LINE = 64;

class Keeper final : public c10::Allocator {
 public:
  static Keeper& instance() {
    // Never destroyed: tensors may outlive every other thing of the process.
    static Keeper* const keeper = [] {
      auto* made = new Keeper();
      // A fork copies the lock as it stands; it must not stand locked.
      pthread_atfork(
          [] { instance().lock_.lock(); }, [] { instance().lock_.unlock(); }, [] { instance().lock_.unlock(); });
      return made;
    }();
    return *keeper;
  }

  c10::DataPtr allocate(size_t bytes) override {
    const size_t size = rounded(bytes);
    void* block = take(size);
    if (block == nullptr) block = fresh(size);
    // The deleter gets the address alone; the size stands in front of what it points at.
    auto* header = static_cast<size_t*>(block);
    *header = size;
    return {static_cast<char*>(block) + LINE, block, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

  // The most bytes that are kept free; what is over it is let go of.
  void limit(size_t bytes) {
    std::vector<void*> surplus;
    {
      std::lock_guard<std::mutex> guard(lock_);
      limit_ = bytes;
      trim(surplus);
    }
    for (void* block : surplus) std::free(block);
  }

  size_t kept() {
    std::lock_guard<std::mutex> guard(lock_);
    return kept_;
  }

  void release() {
    size_t before;
    {
      std::lock_guard<std::mutex> guard(lock_);
      before = limit_;
    }
    limit(0);
    limit(before);
  }

 private:
  static size_t rounded(size_t bytes) {
    const size_t unit = bytes >= LARGE_FROM ? LARGE_PAGE : KEPT_FROM / 4;
    return (bytes + LINE + unit - 1) / unit * unit;
  }

  void* take(size_t size) {
    std::lock_guard<std::mutex> guard(lock_);
    auto found = free_.find(size);
    if (found == free_.end() || found->second.empty()) return nullptr;
    void* block = found->second.back();
    found->second.pop_back();
    kept_ -= size;
    return block;
  }

  void* fresh(size_t size) {
    const bool large = size >= LARGE_FROM;
    void* block = std::aligned_alloc(large ? LARGE_PAGE : LINE, size);
    if (block == nullptr) {
      release();  // what lies here unused is the first to go
      block = std::aligned_alloc(LINE, size);
    }
    if (block == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (large) madvise(block, size, MADV_HUGEPAGE);  // advice: a refusal changes nothing
#endif
    return block;
  }

  static void give_back(void* block) { instance().put(block); }

  void put(void* block) {
    const size_t size = *static_cast<size_t*>(block);
    std::vector<void*> surplus;
    {
      std::lock_guard<std::mutex> guard(lock_);
      if (size > limit_) {
        surplus.push_back(block);
      } else {
        free_[size].push_back(block);
        kept_ += size;
        trim(surplus);
      }
    }
    for (void* each : surplus) std::free(each);
  }

  // Let go of blocks, of the largest size first and those freed longest ago, until the limit holds.
  void trim(std::vector<void*>& surplus) {
    while (kept_ > limit_) {
      auto last = std::prev(free_.end());
      if (last->second.empty()) {
        free_.erase(last);
        continue;
      }
      surplus.push_back(last->second.front());
      last->second.erase(last->second.begin());
      kept_ -= last->first;
    }
  }

  std::mutex lock_;
  std::map<size_t, std::vector<void*>> free_;
  size_t kept_ = 0;
  size_t limit_ = 0;
};

// Whether torch has been asked to fill uninitialized memory, which shows what a kernel leaves unwritten.
inline bool is_filled() {
  const auto& context = at::globalContext();
  return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

// An uninitialized tensor of the shape, type and layout of x, which is packed in some memory format.
inline at::Tensor output_like(const at::Tensor& x) {
  if (x.nbytes() < KEPT_FROM || is_filled()) return at::empty_like(x);
  constexpr auto keys = c10::DispatchKeySet(c10::DispatchKey::CPU);
  return at::detail::empty_strided_generic(x.sizes(), x.strides(), &Keeper::instance(), keys, x.scalar_type());
}

}  // namespace normkit
