"""Cached decoding, greedy or by beams, beside other implementations, in turns.

  python benchmarks/decode.py --versus hf,hf-compile,ctranslate2 --num_beams 4

All run the encoder once and then decode exactly `targets` tokens for each row
with key and value caches, from the same weights; no row ends early. Ours is the
jitted step of `t5x_lite.decoding.steps`, with layers scanned and unrolled (as
`infer`, `eval` and `serve` have them on a CPU, and int8 here);
transformers is PyTorch's eager `generate`, or with its forward pass compiled;
CTranslate2 reads the same weights, converted. Weights are float32, or int8
where the name says so. Read train_step.py for how they are measured.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import side_by_side
import train_step


def arguments() -> argparse.Namespace:
  """Returns the parsed command line."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  peers = 'hf, hf-compile, ctranslate2, ctranslate2-int8'
  parser.add_argument('--versus', default='', help=f'of {peers}; commas between')
  parser.add_argument('--model', default='t5_1_1_small', help='a named size')
  parser.add_argument('--num_layers', type=int)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--inputs', type=int, default=512)
  parser.add_argument('--targets', type=int, default=114)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--num_beams', type=int, default=1)
  parser.add_argument('--layers', default='scanned,unrolled', help='which of ours; int8 needs hf')
  parser.add_argument('--huge_pages', action='store_true')
  parser.add_argument('--weights', help=argparse.SUPPRESS)
  parser.add_argument('--worker', help=argparse.SUPPRESS)
  args = parser.parse_args()
  args.dropout_rate, args.remat_policy, args.scan_layers = 0.0, 'none', True
  return args


def run_ours(args: argparse.Namespace, scan_layers: bool, dtype: str = 'float32') -> None:
  """The jitted predict step."""
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax

  from t5x_lite.decoding import steps
  from t5x_lite.decoding.config import DecodingConfig
  from t5x_lite.models import t5

  # No token has the id -1, so no row ends.
  args.scan_layers = scan_layers
  cfg = train_step.model_config(args).replace(eos_id=-1, param_dtype=dtype)
  graphdef, _, _ = t5.abstract_params(cfg)
  if (Path(args.weights) / 'config.json').exists():
    from t5x_lite.interop import checkpoint_source, tensors

    params = tensors.place(checkpoint_source.open_source(args.weights).tensors, cfg)
  else:
    params = jax.jit(lambda key: t5.init_params(cfg, key))(jax.random.key(0))
  inputs = train_step.make_batch(args, cfg.vocab_size)['inputs']
  batch = {'encoder_input_tokens': jax.device_put(inputs.astype(np.int32))}
  config = DecodingConfig(max_decode_length=args.targets, num_beams=args.num_beams)
  predict = jax.jit(steps.make_predict_step(graphdef, config, scored=False))

  def step() -> float:
    return float(np.asarray(predict(params, batch)[0]).mean())

  side_by_side.work(step)


def run_hf(args: argparse.Namespace, compiled: bool) -> None:
  """PyTorch's generate; the first saves the weights for everyone."""
  import torch

  model = train_step.hf_model(args).eval()
  if not compiled:
    model.save_pretrained(args.weights)
  inputs = torch.from_numpy(train_step.make_batch(args, model.config.vocab_size)['inputs'])
  mask = torch.ones_like(inputs)
  model.generation_config.eos_token_id = None
  static = {}
  if compiled:
    model.forward = torch.compile(model.forward)
    static['cache_implementation'] = 'static'

  def step() -> float:
    with torch.no_grad():
      tokens = model.generate(
        input_ids=inputs,
        attention_mask=mask,
        do_sample=False,
        num_beams=args.num_beams,
        use_cache=True,
        **static,
        max_new_tokens=args.targets,
        min_new_tokens=args.targets,
      )
    # The first is the start token.
    return float(tokens[:, 1:].double().mean())

  side_by_side.work(step, warm_up=1)


def run_ctranslate2(args: argparse.Namespace, dtype: str = 'float32') -> None:
  """CTranslate2's translate_batch, of the weights that run_hf has saved."""
  import ctranslate2
  import transformers

  vocab_size = transformers.AutoConfig.from_pretrained(args.weights).vocab_size
  folder = Path(args.weights) / f'ctranslate2-{dtype}'
  # Its converter wants a tokenizer; ids have names here, no text.
  spec_loader = ctranslate2.converters.transformers._MODEL_LOADERS['T5Config']
  model = transformers.AutoModelForSeq2SeqLM.from_pretrained(args.weights)
  names = [f't{i}' for i in range(vocab_size)]
  names[:3] = ['<pad>', '</s>', '<unk>']
  spec = spec_loader.get_model_spec(model)
  spec.register_source_vocabulary(names)
  spec.register_target_vocabulary(names)
  spec.config.bos_token = spec.config.decoder_start_token = '<pad>'
  spec.config.eos_token, spec.config.unk_token = '</s>', '<unk>'
  spec.config.add_source_bos = spec.config.add_source_eos = False
  spec.validate()
  spec.optimize()
  folder.mkdir()
  spec.save(str(folder))
  translator = ctranslate2.Translator(
    str(folder), device='cpu', compute_type=dtype, intra_threads=os.cpu_count()
  )
  inputs = train_step.make_batch(args, vocab_size)['inputs']
  rows = [[names[i] for i in row] for row in inputs.tolist()]

  def step() -> float:
    found = translator.translate_batch(
      rows,
      beam_size=args.num_beams,
      max_decoding_length=args.targets,
      min_decoding_length=args.targets,
      max_batch_size=len(rows),
    )
    ids = [[names.index(t) for t in one.hypotheses[0]] for one in found] if not seen else []
    seen.extend([float(np.mean(ids))] if ids else [])
    return seen[0]

  seen: list[float] = []
  side_by_side.work(step)


WORKERS = {
  'hf': lambda args: run_hf(args, compiled=False),
  'hf-compile': lambda args: run_hf(args, compiled=True),
  'ctranslate2': run_ctranslate2,
  'ctranslate2-int8': lambda args: run_ctranslate2(args, 'int8'),
  'scanned': lambda args: run_ours(args, scan_layers=True),
  'unrolled': lambda args: run_ours(args, scan_layers=False),
  'int8': lambda args: run_ours(args, scan_layers=False, dtype='int8'),
  'int8-scanned': lambda args: run_ours(args, scan_layers=True, dtype='int8'),
}


def main() -> None:
  """Starts all, lets them run in turns, and prints a table."""
  args = arguments()
  if args.worker:
    WORKERS[args.worker](args)
    return
  names = [*filter(None, args.versus.split(',')), *filter(None, args.layers.split(','))]
  with tempfile.TemporaryDirectory() as directory:
    forwarded = [*sys.argv[1:], '--weights', directory]
    contenders = [side_by_side.start(name, forwarded, args.huge_pages) for name in names]
    side_by_side.rounds(contenders, args.rounds, 1)
  ours = contenders[-1]
  tokens = args.batch_size * args.targets
  print(
    f'{args.model}, batch {args.batch_size}, {args.num_beams} beams, {args.inputs} inputs, '
    f'{args.targets} tokens decoded, huge pages {args.huge_pages}, '
    f'{os.cpu_count()} cores'
  )
  print(
    f'{"":12}{"tokens/s":>10}{"s":>8}{"last is":>9}'
    f'{"tokens/CPU s":>15}{"CPU s":>8}{"ours is":>9}{"mean id":>12}'
  )
  for c in contenders:
    print(
      f'{c.name:12}{tokens / c.seconds:10.0f}{c.seconds:8.2f}'
      f'{c.seconds / ours.seconds:8.2f}x'
      f'{tokens / c.cpu_seconds:15.0f}{c.cpu_seconds:8.2f}'
      f'{c.cpu_seconds / ours.cpu_seconds:8.2f}x{c.last:12.3f}'
    )


if __name__ == '__main__':
  main()
