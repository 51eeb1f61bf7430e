// Functions that are called from Python and by one another; defined in the files named after them.
#pragma once

#include <cstdint>

#include "attention_step.h"
#include "matrix.h"

extern "C" {
#pragma GCC visibility push(default)
// linear.cpp
void ef_linear(const expertfleet::Matrix* matrix, const void* rows, int64_t count,
               int32_t row_type, void* out, int32_t out_type, int32_t silu);
// norm.cpp
void ef_add_rms_norm(const char* x, const char* update, const char* weight, char* sum, char* normed,
                     int64_t num_rows, int64_t size, float eps, int32_t element);
// rotary.cpp
void ef_rotate_and_store(const ef_attention_step* step, char* qkv, char* keys, char* values);
// attention.cpp
void ef_attend(const ef_attention_step* step, const void* qkv, const void* keys, const void* values,
               void* output);
// gate.cpp
void ef_topk_gate(const char* x, const char* weight, float* scratch, int64_t* ids, float* weights,
                  int64_t num_rows, int64_t size, int64_t num_experts, int64_t count,
                  int32_t element);
#pragma GCC visibility pop
}
