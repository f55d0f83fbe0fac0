/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Who asked for what this thread is at. */
#ifndef UNIONFS_ASKER_H
#define UNIONFS_ASKER_H

#include <stdbool.h>
#include <stdint.h>

/* From now on; 0: nobody that we can see. */
void asker_is(uint32_t thread);

/* He has been killed, and waits for nothing but our answer: the kernel lets him go no sooner. */
bool asker_was_killed(void);

#endif
