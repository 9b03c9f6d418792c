#include "cpu/ll_cast_loops.h"

namespace ep::cpu::scalar {
const Fp8Kernels kFp8Kernels{cast_row, accumulate_row, round_row};
}
