"""One Trainer, and objectives of a page each: causal language modelling, chats, reward, direct preferences."""
