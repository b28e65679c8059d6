// What a call to the numba kernels consists of: slots, and launches over tasks on torch's own threads.
//
// Python cuts the work and compiles the kernels (`programs.py`); here a cut is looked up and run. Kernels keep nothing:
// all they read and write stands in the slots.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory_resource>
#include <new>
#include <vector>

#include <torch/csrc/python_headers.h>
#include <torch/csrc/stable/c/shim.h>

namespace normkit {

using Kernel = void (*)(int64_t begin, int64_t end, void* slots);

constexpr int MAX_SLOTS = 48;

// Memory for what stays until the process ends, in pieces of the system's own: small things that stay between large ones
// that come and go would keep the heap of malloc from shrinking. Python's lock guards it.
class Lasting final : public std::pmr::memory_resource {
 public:
  static Lasting* of_process() {
    static auto* memory = new Lasting();
    return memory;
  }

 private:
  static constexpr size_t PIECE = 256 << 10;

  void* do_allocate(size_t bytes, size_t alignment) override {
    size_t start = (used_ + alignment - 1) / alignment * alignment;
    if (piece_ == nullptr || start + bytes > size_) {
      size_ = std::max(PIECE, bytes), start = 0;
      void* given = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (given == MAP_FAILED) throw std::bad_alloc();
      piece_ = static_cast<char*>(given);
    }
    used_ = start + bytes;
    return piece_ + start;
  }

  void do_deallocate(void*, size_t, size_t) override {}
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

  char* piece_ = nullptr;
  size_t size_ = 0, used_ = 0;
};

// One launch of a kernel, and the slots that it wants changed before it.
struct Launch {
  Kernel kernel = nullptr;
  int64_t tasks = 0;
  int64_t grain = 1;
  std::pmr::vector<std::pair<int64_t, int64_t>> changes{Lasting::of_process()};
};

struct Program {
  std::array<int64_t, MAX_SLOTS> slots{};  // all that does not change from call to call
  std::pmr::vector<Launch> launches{Lasting::of_process()};
  int64_t work = 0;    // float64 numbers of working memory
  int64_t tables = 0;  // numbers of the type computed in, of tables of sums
  int64_t elements = 0;
};

// The threads of a pool do not survive a fork, and waiting for them would never end: a child works alone.
inline std::atomic<bool>& forked() {
  static std::atomic<bool> value{false};
  return value;
}

inline void watch_for_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forked() = true; });
  (void)registered;
}

// The slot that says whether an output passes the caches by; that takes outputs which begin at a line of the cache.
constexpr int STREAM = 23;
constexpr int64_t LINE_BYTES = 64;

// Stream no output where one of these, addresses or-ed, is not aligned to a line: as `Plan.sizes_at`.
inline void stream_aligned(int64_t* slots, int64_t addresses) {
  if (addresses % LINE_BYTES) slots[STREAM] = 0;
}

inline int64_t bits(double value) {
  int64_t result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}

// Elements from which other Python threads may run beside a kernel; below it giving up the lock costs more.
constexpr int64_t WORTH_RELEASING = 1 << 16;

// A function of Python that is told the address of every kernel that is launched, for tests; null otherwise.
inline std::atomic<PyObject*>& watcher() {
  static std::atomic<PyObject*> value{nullptr};
  return value;
}

inline void tell_watcher(Kernel kernel) {
  PyGILState_STATE state = PyGILState_Ensure();
  if (PyObject* function = watcher().load()) {
    PyObject* answer = PyObject_CallFunction(function, "L", reinterpret_cast<long long>(kernel));
    if (answer == nullptr) PyErr_WriteUnraisable(function);
    Py_XDECREF(answer);
  }
  PyGILState_Release(state);
}

inline void launch_all(const Program& program, int64_t* slots) {
  for (const Launch& launch : program.launches) {
    for (const auto& [slot, value] : launch.changes) slots[slot] = value;
    if (watcher().load(std::memory_order_relaxed) != nullptr) tell_watcher(launch.kernel);
    if (launch.tasks <= launch.grain || forked()) {
      launch.kernel(0, launch.tasks, slots);
    } else if (torch_parallel_for(0, launch.tasks, launch.grain, launch.kernel, slots)) {
      throw std::runtime_error("torch_parallel_for failed");
    }
  }
}

// Run a program; the caller says whether it holds Python's lock.
inline void run(const Program& program, int64_t* slots, bool locked) {
  if (locked && program.elements >= WORTH_RELEASING) {
    PyThreadState* state = PyEval_SaveThread();
    try {
      launch_all(program, slots);
    } catch (...) {
      PyEval_RestoreThread(state);
      throw;
    }
    PyEval_RestoreThread(state);
  } else {
    launch_all(program, slots);
  }
}

}  // namespace normkit
