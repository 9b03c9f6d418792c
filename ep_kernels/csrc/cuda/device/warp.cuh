#pragma once

namespace ep::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;  ///< of a warp, for its shuffles and votes

}  // namespace ep::cuda
