// Memory of CPU tensors that glibc can use again.
//
// PyTorch asks for aligned memory (posix_memalign). Before glibc 2.38 that takes a free block only if it is larger by the
// alignment than what is asked for, so a tensor never fits where one of its own size was freed, and a training step's
// memory grows half again as large as its tensors; under activation checkpointing several times. Here the alignment's
// slack is part of the request, and blocks of one size fill each other's places.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace ddpo {
namespace {

constexpr size_t kAlignment = 64;  // c10::gAlignment on desktops and servers

struct TightAllocator final : c10::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes) {
      void* block = std::malloc(bytes + kAlignment + sizeof(void*));
      TORCH_CHECK_WITH(OutOfMemoryError, block, "ddpo: cannot allocate ", bytes, " bytes");
      const uintptr_t first = reinterpret_cast<uintptr_t>(block) + sizeof(void*);
      data = reinterpret_cast<void*>((first + kAlignment - 1) / kAlignment * kAlignment);
      static_cast<void**>(data)[-1] = block;
      c10::profiledCPUMemoryReporter().New(data, bytes);
    }
    return {data, data, &free, at::Device(at::DeviceType::CPU)};
  }

  static void free(void* data) {
    if (!data) return;
    c10::profiledCPUMemoryReporter().Delete(data);
    std::free(static_cast<void**>(data)[-1]);
  }

  at::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};

// For tensors made from now on, in the whole process; each is freed as it was made.
void allocate_tightly(bool on) {
  static TightAllocator tight;
  c10::SetCPUAllocator(on ? &tight : c10::GetDefaultCPUAllocator());
}

}  // namespace
}  // namespace ddpo

TORCH_LIBRARY_FRAGMENT(ddpo, m) { m.def("allocate_tightly(bool on) -> ()", &ddpo::allocate_tightly); }
