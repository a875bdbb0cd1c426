#include "isa.h"

#if SPECMOE_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specmoe {

#define SPECMOE_DECLARE(name) \
  namespace name {            \
  const KernelTable& table(); \
  }
SPECMOE_DECLARE(portable)
#if SPECMOE_HAVE_AVX2
SPECMOE_DECLARE(avx2)
#endif
#if SPECMOE_HAVE_AVX512
SPECMOE_DECLARE(avx512)
#endif
#if SPECMOE_HAVE_AVX512BF16
SPECMOE_DECLARE(avx512bf16)
#endif
#if SPECMOE_HAVE_AMX
SPECMOE_DECLARE(amx)
#endif
#if SPECMOE_HAVE_NEON
SPECMOE_DECLARE(neon)
#endif
#undef SPECMOE_DECLARE

namespace {

#if SPECMOE_HAVE_AMX
// Whether the CPU has tiles of bfloat16 and the system lets this process use them, which it has to ask for.
bool has_tiles() {
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kBF16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) == 0 || (d & kBF16) == 0) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

std::vector<const KernelTable*> tables() {
  std::vector<const KernelTable*> found;
#if SPECMOE_HAVE_AVX2
  __builtin_cpu_init();
  [[maybe_unused]] const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if SPECMOE_HAVE_AMX
  if (avx512 && __builtin_cpu_supports("avx512bf16") && has_tiles()) found.push_back(&amx::table());
#endif
#if SPECMOE_HAVE_AVX512BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::table());
#endif
#if SPECMOE_HAVE_AVX512
  if (avx512) found.push_back(&avx512::table());
#endif
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::table());
#endif
#if SPECMOE_HAVE_NEON
  found.push_back(&neon::table());
#endif
  found.push_back(&portable::table());
  return found;
}

}  // namespace

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const KernelTable* t : tables()) names.push_back(t->name);
  return names;
}

const KernelTable* isa_table(std::string_view name) {
  static const std::vector<const KernelTable*> found = tables();
  if (name == "auto") return found.front();
  for (const KernelTable* t : found) {
    if (name == t->name) return t;
  }
  return nullptr;
}

}  // namespace specmoe
