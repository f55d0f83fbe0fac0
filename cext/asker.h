/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Who asked for what this thread is at. */
#ifndef UNIONFS_ASKER_H
#define UNIONFS_ASKER_H

#include <stdbool.h>
#include <stdint.h>

/* How much is copied between two looks whether he is still there. */
enum { COPY_STEP_BYTES = 64 << 20 };

/* From now on; 0: nobody that we can see. */
void asker_is(uint32_t thread);

/* He has been killed, and waits for nothing but our answer: the kernel lets him go no sooner. */
bool asker_was_killed(void);

#endif
