"""From a real module to what theory may know of it; the one bridge from torch.nn to theory."""

from torch_rmt.describe.activation import from_torch as from_torch
from torch_rmt.describe.chain import default_ends as default_ends
from torch_rmt.describe.chain import describe as describe
from torch_rmt.describe.chain import describe_between as describe_between
from torch_rmt.describe.forward_graph import ForwardGraph as ForwardGraph
from torch_rmt.describe.forward_graph import WeightUse as WeightUse
from torch_rmt.describe.forward_graph import record as record
from torch_rmt.describe.links import Link as Link
from torch_rmt.describe.links import layer_of as layer_of
from torch_rmt.describe.links import read_links as read_links
from torch_rmt.describe.parts import SlopePart as SlopePart
from torch_rmt.describe.parts import WeightPart as WeightPart
from torch_rmt.describe.parts import independent_size as independent_size
from torch_rmt.describe.parts import parts_between as parts_between
from torch_rmt.describe.stretch import stretch_to as stretch_to
