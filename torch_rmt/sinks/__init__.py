"""Reports shown: TensorBoard, JSON lines, figures, a page of HTML; their libraries load when used."""

from torch_rmt.sinks.drawing import Drawing as Drawing
from torch_rmt.sinks.drawing import draw as draw
from torch_rmt.sinks.figures import figure as figure
from torch_rmt.sinks.html import write_html as write_html
from torch_rmt.sinks.json_lines import JsonLinesSink as JsonLinesSink
from torch_rmt.sinks.json_lines import Sink as Sink
from torch_rmt.sinks.tensorboard import TensorBoardSink as TensorBoardSink
