// The machine's own limits, measured in the same process as the kernels that are held against them.
#pragma once
#include <cstdint>
#include <string>

namespace specmoe {

double read_bandwidth(const std::string& isa, int64_t bytes, int threads);  // bytes/s of a pure read of `bytes` of fresh memory
double fma_peak(const std::string& isa, int threads);                       // float32 flop/s

}  // namespace specmoe
