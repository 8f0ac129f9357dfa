// The merge of product keys on CUDA, as the bindings call it. Pointers of the parameters are of the device, the
// parameters themselves of the host.
#pragma once

#include "core/gather_params.h"

namespace attnfast::cuda {

// What the kernel does not have and this call needs, or null. Such a call must be refused by this name.
const char* product_keys_missing(const ProductKeysParams& params);

// Queued on `stream` (a cudaStream_t). Throws std::runtime_error naming kernel and shape if it cannot be launched.
void product_keys(const ProductKeysParams& params, void* stream);

}  // namespace attnfast::cuda
