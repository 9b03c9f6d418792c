#include "cpu/ll_cast_loops.h"

namespace ep::cpu::avx2 {
const Fp8Kernels kFp8Kernels{cast_row, accumulate_row, round_row};
}
