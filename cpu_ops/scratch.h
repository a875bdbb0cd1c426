// Buffers of each thread that live from call to call: a step of a model calls the kernels hundreds of times.
#pragma once
#include <cstdint>

namespace specmoe {

// Who holds which buffer, and for how long. Two holders on one thread are never alive with the same buffer: a thread works for one
// kernel call at a time (Parallel::run returns only when its tasks have ended, and runs none of another call meanwhile), and within a
// call the lives nest in the order of the lines below.
enum class Scratch : int {
  kAttentionStates,  // chunked_attention.cc: running softmaxes, of one head during its task or of all slots during a split call
  kAttentionChunk,   // Chunk: queries, scores and packed keys, within one attention_chunk
  kAttentionRow,     // one row of D floats between two formats, within one function that calls no other holder
  kFfnCall,          // expert_ffn.cc: rows as float, hidden units and partial sums, of the calling thread during the call
  kFfnTask,          // expert_ffn_kernel.inc: gate and up of a range of hidden units, within one ffn_hidden or rowwise_hidden
  kProductRows,      // few_rows_product.cc: rows of x as the kernel reads them, of the calling thread during the call
  kProductFloats,    // few_rows_product_kernel.inc: four rows of weights as float, within one product_range
  kCount,
};

// At least `floats` floats, 64-byte aligned, with whatever they held before. Throws std::bad_alloc.
float* thread_scratch(Scratch which, int64_t floats);

}  // namespace specmoe
