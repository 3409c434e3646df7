"""The one training loop: a student model, an objective, data by seed; micro-batches, schedules, masks, resume, many processes.

`distill` is made of it; passes that train use it too. Every module here imports torch.
"""
