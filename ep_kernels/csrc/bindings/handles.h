#pragma once

#include <memory>

#include "cpu/buffer.h"

// What the opaque handles of the CPU interfaces are.

struct EpBuffer {
  explicit EpBuffer(const ep::cpu::Buffer::Config& config) : impl(config) {}
  ep::cpu::Buffer impl;
};

struct EpOp {
  std::shared_ptr<ep::PendingOp> impl;
};
