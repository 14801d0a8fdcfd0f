// Which tiers this machine runs. Compiled for the baseline: it must run everywhere.
#include <stdexcept>

#include "linear.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace vllm_sparse::cpu {
namespace {

#if defined(__x86_64__)

bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

const Tier& avx512_bf16_tier() {
    static const Tier tier = [] {
        Tier t = avx512_tier;
        t.name = "avx512_bf16";
        t.multiply_bf16 = avx512_bf16_multiply;
        t.gram = &avx512_bf16_gram;
        return t;
    }();
    return tier;
}

#elif defined(__aarch64__)

bool has_dot_products() {
#if defined(__linux__)
    constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
    return getauxval(AT_HWCAP) & kDotProducts;
#else
    return true;  // every Apple processor that runs macOS
#endif
}

#endif

}  // namespace

std::vector<const Tier*> available_tiers() {
    std::vector<const Tier*> tiers;
#if defined(__x86_64__)
    if (has_avx512_bf16()) tiers.push_back(&avx512_bf16_tier());
    if (has_avx512()) tiers.push_back(&avx512_tier);
    if (has_avx2()) tiers.push_back(&avx2_tier);
#elif defined(__aarch64__)
    if (has_dot_products()) tiers.push_back(&neon_tier);
#endif
    tiers.push_back(&scalar_tier);
    return tiers;
}

const Tier& find_tier(const std::string& name) {
    std::string names;
    for (const Tier* tier : available_tiers()) {
        if (name.empty() || name == tier->name) return *tier;
        names += (names.empty() ? "" : ", ") + std::string(tier->name);
    }
    throw std::invalid_argument("no CPU kernels named '" + name + "' run on this machine; it has " + names);
}

}  // namespace vllm_sparse::cpu
