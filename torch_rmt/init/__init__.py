"""Choose and apply the initialisation at which signals and gradients survive depth."""

from torch_rmt.init.critical import InitReport as InitReport
from torch_rmt.init.critical import LayerInit as LayerInit
from torch_rmt.init.critical import critical_init_ as critical_init_
from torch_rmt.init.plan import isometry_q as isometry_q
from torch_rmt.init.signal import LayerSignal as LayerSignal
from torch_rmt.init.signal import chi_per_layer as chi_per_layer
from torch_rmt.init.signal import gradient_ratio as gradient_ratio
from torch_rmt.init.signal import signals as signals
