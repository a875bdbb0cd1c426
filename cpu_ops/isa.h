// One table of kernels per instruction set; which of them this machine can run.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace specmoe {

enum class DType;
struct AttentionArgs;
struct AttentionRequest;
struct AttentionState;
struct FfnArgs;
struct FfnGroup;
struct FfnWay;
struct ProductArgs;
struct RowwiseArgs;

struct KernelTable {
  const char* name;
  int lanes;  // floats of a register
  // Attends request `r`, KV head `k`, to the cache positions [begin, end) inside one chunk; appends the new tokens among them
  // first.
  void (*attention_chunk)(const AttentionArgs&, const AttentionRequest& r, int64_t k, int64_t begin, int64_t end, AttentionState&);
  void (*attention_merge)(const AttentionArgs&, int64_t rows, AttentionState& total, const AttentionState& part);
  void (*attention_finish)(const AttentionArgs&, const AttentionRequest& r, int64_t k, const AttentionState& total);
  // n numbers from `at` on as 4-bit weights meet them, in integer_floats(n).
  void (*integers_from)(const void* from, DType type, int64_t at, int64_t n, float* to);
  FfnWay (*ffn_way)(const FfnArgs&);
  void (*ffn_hidden)(const FfnArgs&, const FfnGroup&, int64_t f_begin, int64_t f_end);
  void (*ffn_output)(const FfnArgs&, const FfnGroup&, int64_t m_begin, int64_t m_end);
  void (*ffn_partial)(const FfnArgs&, const FfnGroup&, int64_t block, int64_t m_begin, int64_t m_end);
  void (*rowwise_hidden)(const RowwiseArgs&, const FfnGroup&, int64_t f_begin, int64_t f_end);
  void (*rowwise_output)(const RowwiseArgs&, const FfnGroup&, int64_t m_begin, int64_t m_end);
  int64_t (*product_multiple)(const ProductArgs&);  // of rows of W, which product_range meets together
  int64_t (*product_row_floats)(const ProductArgs&);
  void (*product_gather)(const ProductArgs&, float* rows);
  void (*product_range)(const ProductArgs&, int64_t begin, int64_t end);  // rows [begin, end) of W
  double (*fma_peak)(int64_t iterations);               // flops done; for the benchmark's own limits
  double (*read_sum)(const void* data, int64_t bytes);  // a pure read; for the benchmark's own limits
};

// Names of the tables this CPU can run, best first.
std::vector<std::string> isa_names();
// The table of that name; "auto" is the best one. nullptr when this build or this CPU has none.
const KernelTable* isa_table(std::string_view name);

}  // namespace specmoe
