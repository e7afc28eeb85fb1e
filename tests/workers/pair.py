"""One of two processes of `evaluate.load(num_process=2)`, which share a file system."""

import evaluate
import torch
from support import SCRIPT


def work(process_id, cases, queue):
    """Compute each case, in a folder of its own, and tell what came."""
    answers = {}
    for case, (parts, cache_dir, options) in cases.items():
        ppl = evaluate.load(
            SCRIPT,
            num_process=2,
            process_id=process_id,
            experiment_id="pair",
            cache_dir=cache_dir,
            timeout=60,
            **options,
        )
        for logits, targets in parts[process_id]:
            ppl.add_batch(predictions=torch.tensor(logits), references=torch.tensor(targets))
        try:
            answers[case] = (ppl.compute(), len(ppl))
        except ValueError as error:
            answers[case] = (str(error), len(ppl))
    queue.put((process_id, answers))
