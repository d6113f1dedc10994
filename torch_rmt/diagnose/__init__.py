"""The whole datum in one call, no trainer needed: measure, predict, compare."""

from torch_rmt.diagnose.diagnosis import WHAT as WHAT
from torch_rmt.diagnose.diagnosis import Diagnosis as Diagnosis
from torch_rmt.diagnose.diagnosis import diagnose as diagnose
from torch_rmt.diagnose.measuring import measure as measure
from torch_rmt.diagnose.parts import freeness_report as freeness_report
from torch_rmt.diagnose.reports import jacobian_report as jacobian_report
