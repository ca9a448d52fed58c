// Memory of CPU tensors that glibc can use again.
//
// PyTorch asks for aligned memory (posix_memalign). Before glibc 2.38 that takes a free block only if it is larger by the
// alignment than what is asked for, so a tensor never fits where one of its own size was freed, and a training step's
// memory grows half again as large as its tensors; under activation checkpointing several times. Here the alignment's
// slack is part of the request, and blocks of one size fill each other's places.
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#ifdef __GLIBC__
#include <gnu/libc-version.h>
#endif

namespace ddpo {
namespace {

constexpr size_t kAlignment = 64;  // c10::gAlignment on desktops and servers

struct TightAllocator final : c10::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    TORCH_CHECK_WITH(OutOfMemoryError, bytes <= PTRDIFF_MAX, "ddpo: cannot allocate ", bytes, " bytes");
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

bool wants_slack() {
#ifdef __GLIBC__
  int major = 0, minor = 0;
  return std::sscanf(gnu_get_libc_version(), "%d.%d", &major, &minor) == 2 && major == 2 && minor < 38;
#else
  return false;
#endif
}

// For tensors made from now on, in the whole process; each is freed as it was made. Off: as it was before.
void allocate_tightly(bool on) {
  static auto* const tight = new TightAllocator;  // tensors may outlive what is destroyed at exit
  static c10::Allocator* before = nullptr;
  c10::Allocator* const now = c10::GetCPUAllocator();
  if (on && now != tight && wants_slack()) {
    before = now;
    c10::SetCPUAllocator(tight);
  } else if (!on && now == tight) {
    c10::SetCPUAllocator(before);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(ddpo, CompositeExplicitAutograd, m) { m.impl("allocate_tightly", allocate_tightly); }

}  // namespace ddpo
