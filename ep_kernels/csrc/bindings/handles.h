#pragma once

#include "cpu/buffer.h"

/// What the C interfaces of the host backend call a buffer.
struct EpBuffer {
  explicit EpBuffer(const ep::cpu::Buffer::Config& config) : impl(config) {}
  ep::cpu::Buffer impl;
};
